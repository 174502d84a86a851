"""The traffic light: what it follows from, and that it does not promise what was not measured."""

from __future__ import annotations

from typing import Any

import pytest

from dfq.report.verdict import verdict_of

NOTHING = (None, None)


def kept(objects: int, count: int, **more: Any) -> dict[str, Any]:
    # What is kept with a lower score does not count.
    return {"objects": objects, "kept": objects, "kept_above": count, "images": 12, **more}


@pytest.mark.parametrize(
    ("before", "after", "light"),
    [
        (0.5, 0.485, "green"), (0.5, 0.484, "amber"), (0.5, 0.45, "amber"), (0.5, 0.449, "red"),
        (0.5, 0.0, "red"),
    ],
)  # fmt: skip
def test_measured_accuracy_decides(before: float, after: float, light: str) -> None:
    # Whatever else was seen.
    metrics = {"closeness": {"photos": kept(100, 10), "synthetic": kept(100, 99, held_out=True)}}
    found = verdict_of(metrics, (before, after))
    assert found.light == light
    assert f"{after:.3f}" in found.why
    assert f"{after / before:.1%}" in found.why


@pytest.mark.parametrize(
    ("count", "light"), [(90, "green"), (89, "amber"), (75, "amber"), (74, "red")]
)
def test_photos_come_next(count: int, light: str) -> None:
    metrics = {
        "closeness": {"photos": kept(100, count), "synthetic": kept(100, 100, held_out=True)}
    }
    found = verdict_of(metrics, NOTHING)
    assert found.light == light
    assert f"{count} of" in found.why
    assert "labels was not measured" in found.why


@pytest.mark.parametrize(
    ("held_out", "warnings", "light"),
    [(True, [], "green"), (False, [], "amber"), (True, ["far"], "amber")],
)
def test_synthetic_images_alone(held_out: bool, warnings: list[str], light: str) -> None:
    metrics = {
        "closeness": {"synthetic": kept(100, 100, held_out=held_out)},
        "set_quality": {"warnings": warnings},
    }
    found = verdict_of(metrics, NOTHING)
    assert found.light == light
    assert "was not measured" in found.why


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"closeness": {"synthetic": kept(19, 19, held_out=True)}},
        {"closeness": {"synthetic": kept(0, 0, held_out=True)}},
        {"closeness": 7},
        {"closeness": {"synthetic": "all"}},
        {"closeness": {"synthetic": {"objects": "many", "kept_above": None}}},
    ],
)
def test_of_too_little_nothing_is_said(metrics: Any) -> None:
    assert verdict_of(metrics, NOTHING).light == "grey"
    assert verdict_of(metrics, (0.0, 0.0)).light == "grey"

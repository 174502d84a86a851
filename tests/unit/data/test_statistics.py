"""What a set is said to hold, against figures counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dfq.data.calibration_set import CalibrationSet
from dfq.data.calibration_writer import CalibrationWriter
from dfq.data.image_set import ImageSet, make_item
from dfq.data.statistics import QUANTILES, Objects, summarize
from dfq.errors import UserError

NAMES = ["cat", "dog", "bird"]
WIDTH, HEIGHT = 200, 100

# Sides in pixels: 20 x 20 (small), 40 x 90 (medium), 128 x 100 (large), 20 x 20 (small).
LABELS = [
    torch.tensor([[2, 0.5, 0.5, 0.1, 0.2], [0, 0.5, 0.5, 0.2, 0.9]]),
    torch.zeros(0, 5),
    torch.tensor([[2, 0.5, 0.5, 0.64, 1.0]]),
    torch.tensor([[2, 0.5, 0.5, 0.1, 0.2]]),
]
SCORES = [torch.tensor([0.9, 0.5]), torch.zeros(0), torch.tensor([0.1]), torch.tensor([0.5])]


@pytest.fixture
def data(tmp_path: Path) -> CalibrationSet:
    writer = CalibrationWriter(tmp_path / "set", {"seed": 0}, NAMES, 1)
    images = torch.zeros(4, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    writer.append(0, 0, images, LABELS, SCORES)
    return writer.finish({})


def test_counts(data: CalibrationSet) -> None:
    found = summarize(Objects.of(data))
    assert (found.images, found.objects) == (4, 4)
    assert found.sizes == [(WIDTH, HEIGHT, 4)]
    assert found.per_image == {0: 1, 1: 2, 2: 1}
    # "dog" does not occur.
    assert found.categories == [("bird", 3), ("cat", 1)]
    assert found.by_size == {"small": 2, "medium": 1, "large": 1}
    assert found.mean_score == pytest.approx(0.5, abs=1e-5)


def test_quantiles(data: CalibrationSet) -> None:
    found = summarize(Objects.of(data))
    areas = sorted([400.0, 3600.0, 12800.0, 400.0])

    def interpolated(values: list[float], share: float) -> float:
        at = share * (len(values) - 1)
        low = int(at)
        high = min(low + 1, len(values) - 1)
        return values[low] + (at - low) * (values[high] - values[low])

    expected = [interpolated([a / 20000 for a in areas], q) for q in QUANTILES]
    assert found.area == pytest.approx(expected, rel=1e-4)
    expected = [interpolated([a**0.5 for a in areas], q) for q in QUANTILES]
    assert found.side == pytest.approx(expected, rel=1e-4)
    expected = [interpolated([0.1, 0.5, 0.5, 0.9], q) for q in QUANTILES]
    assert found.score == pytest.approx(expected, abs=1e-5)


def test_top_categories(data: CalibrationSet) -> None:
    found = summarize(Objects.of(data))
    assert found.top(1) == ([("bird", 3)], 1, 1)
    assert found.top(20) == ([("bird", 3), ("cat", 1)], 0, 0)


def test_a_set_without_objects(tmp_path: Path) -> None:
    writer = CalibrationWriter(tmp_path, {}, NAMES, 1)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    writer.append(0, 0, images, [torch.zeros(0, 5)] * 2, [torch.zeros(0)] * 2)
    found = summarize(Objects.of(writer.finish({})))
    assert (found.images, found.objects) == (2, 0)
    assert found.side is found.area is found.score is found.mean_score is None
    assert found.per_image == {0: 2}
    assert json.loads(json.dumps(found.to_dict()))["box_side_pixels"] is None


def test_json_says_the_same(data: CalibrationSet) -> None:
    found = summarize(Objects.of(data))
    written = json.loads(json.dumps(found.to_dict()))
    assert written["objects_per_image"] == {"0": 1, "1": 2, "2": 1}
    assert written["categories"][0] == {"name": "bird", "objects": 3}
    assert written["score"]["0.5"] == pytest.approx(0.5, abs=1e-5)


def test_objects_of_a_real_set_leave_crowds_out(tmp_path: Path) -> None:
    first, _ = make_item(
        tmp_path / "a.png", (64, 48), 1, [[0, 0, 10, 20], [5, 5, 60, 40]], [1, 0], [False, True]
    )
    second, _ = make_item(tmp_path / "b.png", (30, 30), 2, [], [])
    found = Objects.of(ImageSet(tmp_path, NAMES, [first, second]))
    assert found.counts.tolist() == [1, 0]
    assert found.categories.tolist() == [1]
    assert found.sides.tolist() == [[10, 20]]
    assert found.sizes.tolist() == [[64, 48], [30, 30]]
    assert found.scores is None


def test_some_of_the_images(data: CalibrationSet) -> None:
    found = Objects.of(data).where(np.array([False, True, True, True]))
    assert found.counts.tolist() == [0, 1, 1]
    assert found.sides == pytest.approx(np.array([[128, 100], [20, 20]]), abs=1e-3)
    assert found.scores == pytest.approx([0.1, 0.5], abs=1e-5)


def test_what_is_broken(data: CalibrationSet) -> None:
    with pytest.raises(UserError, match="category 3 has no name"):
        Objects.of(replace(data, names=["cat", "dog"]))
    with pytest.raises(UserError, match="holds no images"):
        Objects.of(replace(data, files=[], labels=[], scores=[]))
    (data.root / data.files[1]).unlink()
    with pytest.raises(UserError, match=r"00000001\.png: no such file"):
        Objects.of(data)

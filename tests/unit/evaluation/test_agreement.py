"""Measured against a float network's detections: what counts, and what is worked out from it."""

# ruff: noqa: SIM300 - `found.AP` is a measured value, not the constant its capitals suggest
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.coco_parts import NAMES, FakeDetector, found

from dfq.data.image_set import ImageSet
from dfq.data.readers import open_set
from dfq.errors import UserError
from dfq.evaluation.agreement import agreement, check_categories, kept_of, sentence
from dfq.models.base import Detections
from dfq.runtime.progress import Silent

A, B, C = [0.0, 0, 20, 20], [30.0, 30, 60, 60], [0.0, 40, 20, 60]


@pytest.fixture
def photos(tmp_path: Path) -> ImageSet:
    for index in range(2):
        pixels = np.full((64, 64, 3), 40 * index, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    return open_set(tmp_path)


def nothing() -> Detections:
    return found()


def test_what_is_kept_is_of_the_category_and_place() -> None:
    wanted = [found((A, 0.9, 0), (B, 0.8, 1), (C, 0.31, 2), (C, 0.3, 0)), found((A, 0.5, 1))]
    # Half of B by its width: an IoU of 0.5 counts. C has another category, and A of the second
    # image is there with a score that is no detection by itself.
    given = [
        found((A, 0.7, 0), ([30.0, 30, 45, 60], 0.85, 1), (C, 0.9, 1)),
        found((A, 0.1, 1)),
    ]
    result = kept_of(wanted, given)
    assert (result.objects, result.kept, result.kept_above, result.images) == (4, 3, 2, 2)
    assert result.score_shift == pytest.approx((-0.2 + 0.05 - 0.4) / 3, abs=1e-5)
    text = sentence(result, "2 photos")
    assert "4 detections" in text
    assert "3 are kept" in text
    assert "2 of them" in text
    assert "-0.183 on average" in text


def test_each_object_is_kept_once_by_the_surest() -> None:
    wanted = [found((A, 0.9, 0))]
    result = kept_of(wanted, [found((A, 0.2, 0), ([0.0, 0, 20, 16], 0.6, 0))])
    assert (result.objects, result.kept) == (1, 1)
    assert result.score_shift == pytest.approx(-0.3)
    # And one detection keeps one object.
    near = [found((A, 0.9, 0), ([0.0, 0, 20, 16], 0.8, 0))]
    assert kept_of(near, wanted).kept == 1


def test_a_network_that_gives_nan_keeps_nothing() -> None:
    wanted = [found((A, 0.9, 0))]
    result = kept_of(wanted, [found(([math.nan] * 4, 0.9, 0), (A, math.nan, 0))])
    assert (result.kept, result.score_shift) == (0, None)
    assert "0 are kept" in sentence(result, "1 image")
    assert kept_of([nothing()], wanted).objects == 0
    assert "cannot be said" in sentence(kept_of([nothing()], wanted), "1 image")


def test_ap_against_detections(photos: ImageSet) -> None:
    wanted = [found((A, 0.9, 0), (B, 0.8, 1), (C, 0.2, 2)), found((A, 0.5, 1))]
    again = [found((A, 0.9, 0), (B, 0.8, 1), (C, 0.2, 2)), found((A, 0.5, 1))]
    same = agreement(
        FakeDetector(again), FakeDetector(wanted), photos, progress=Silent(), interval=True
    )
    assert (same.AP, same.AP50) == (pytest.approx(1), pytest.approx(1))
    assert (same.objects, same.kept, same.score_shift) == (3, 3, 0)
    assert same.AP_interval == (pytest.approx(1),) * 2
    # Category 0 is found, one of the two of category 1 is; what is not above 0.3 is no object.
    part = agreement(
        FakeDetector([found((A, 0.9, 0)), found((A, 0.5, 1))]), FakeDetector(wanted), photos,
        progress=Silent(),
    )  # fmt: skip
    assert part.AP == pytest.approx((1 + 51 / 101) / 2)
    assert (part.objects, part.kept, part.images) == (3, 2, 2)


def test_two_categories_of_one_name_are_two(photos: ImageSet) -> None:
    twice = ["cat", "cat", "dog"]
    wanted = [found((A, 0.9, 0), (B, 0.8, 1)), nothing()]
    swapped = [found((A, 0.9, 1), (B, 0.8, 0)), nothing()]
    same = agreement(
        FakeDetector(wanted, twice), FakeDetector(wanted, twice), photos, progress=Silent()
    )
    assert (same.AP, same.kept) == (pytest.approx(1), 2)
    other = agreement(
        FakeDetector(swapped, twice), FakeDetector(wanted, twice), photos, progress=Silent()
    )
    assert (other.AP, other.kept) == (0, 0)


def test_nothing_detected_is_no_figure(photos: ImageSet) -> None:
    result = agreement(
        FakeDetector([nothing(), nothing()]),
        FakeDetector([found((A, 0.3, 0)), nothing()]),
        photos,
        progress=Silent(),
        interval=True,
    )
    assert result.objects == 0
    assert math.isnan(result.AP)
    assert result.to_dict()["AP"] is None


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["cat", "dog"], "2, and the model's are 3"),
        (["cat", "bird", "dog"], "category 1 is 'bird', and the model's is 'dog'"),
    ],
)
def test_categories_that_differ(names: list[str], what: str) -> None:
    other = FakeDetector([], names)
    other.source = "other.pt"
    with pytest.raises(UserError, match=f"other.pt: its categories .*{what}"):
        check_categories(FakeDetector([]), other)
    check_categories(FakeDetector([]), FakeDetector([], list(NAMES)))

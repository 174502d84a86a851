"""Average precision by VOC's rule: worked by hand, and mmdet's."""

# ruff: noqa: SIM300 - `AP50` is a measured value, not the constant its capitals suggest
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support.coco_parts import NAMES, found, image_set

from dfq.data.readers import ImageSet
from dfq.evaluation.coco import score
from dfq.evaluation.voc import voc_ap50
from dfq.models.base import Detections

HERE, THERE, AWAY = [0.0, 0.0, 40.0, 40.0], [50.0, 0.0, 90.0, 40.0], [100.0, 50.0, 140.0, 90.0]


def test_a_case_worked_by_hand() -> None:
    # Three cats; by falling score right, wrong, right, and one is missed. Precision 1 up to recall
    # 1/3, then 2/3 up to 2/3, then 0. The dog is found.
    data = image_set([(HERE, 0, False), (THERE, 0, False), (AWAY, 1, False)], [(HERE, 0, False)])
    answers = [found((HERE, 0.9, 0), (AWAY, 0.8, 0), (THERE, 0.7, 0), (AWAY, 0.5, 1)), found()]
    cats = 1 / 3 * 1 + 1 / 3 * 2 / 3
    assert voc_ap50(data, answers, NAMES) == pytest.approx((cats + 1) / 2)
    # COCO reads precision at 101 recalls: 34 up to 0.33, 33 up to 0.66.
    assert score(data, answers, NAMES).AP50 == pytest.approx(((34 + 33 * 2 / 3) / 101 + 1) / 2)


def test_a_second_detection_of_an_object_is_wrong_though_it_overlaps_another() -> None:
    # Two objects that overlap by 0.6; both detections overlap the first most.
    data = image_set([([0.0, 0.0, 100.0, 10.0], 0, False), ([25.0, 0.0, 125.0, 10.0], 0, False)])
    answers = [found(([0.0, 0.0, 100.0, 10.0], 0.9, 0), ([10.0, 0.0, 110.0, 10.0], 0.8, 0))]
    assert voc_ap50(data, answers, NAMES) == pytest.approx(0.5)
    # COCO gives it to the other one.
    assert score(data, answers, NAMES).AP50 == pytest.approx(1)


def test_difficult_objects_count_neither_way() -> None:
    data = image_set([(HERE, 0, True), (THERE, 0, False)])
    twice = [found((HERE, 0.9, 0), ([1.0, 0.0, 40.0, 40.0], 0.8, 0), (THERE, 0.5, 0))]
    assert voc_ap50(data, twice, NAMES) == pytest.approx(1)
    # Half of it is not enough overlap, however much of the detection lies inside.
    inside = [found(([0.0, 0.0, 18.0, 40.0], 0.9, 0), (THERE, 0.5, 0))]
    assert voc_ap50(data, inside, NAMES) == pytest.approx(0.5)


def test_nothing_detected_and_nothing_to_find() -> None:
    assert voc_ap50(image_set([(HERE, 0, False)]), [found()], NAMES) == 0
    assert math.isnan(voc_ap50(image_set([(HERE, 0, True)]), [found((HERE, 0.5, 0))], NAMES))


def case(seed: int) -> tuple[ImageSet, list[Detections]]:
    """Objects, some of them difficult, and detections near them, with some scores alike."""
    rng = np.random.default_rng(seed)
    truths: list[Any] = []
    answers = []
    for _ in range(6):
        truth, rows = [], []
        for _ in range(int(rng.integers(0, 6))):
            corner, sides = rng.uniform(0, 100, 2), rng.uniform(20, 60, 2)
            box = [*corner, *(corner + sides)]
            label = int(rng.integers(2))
            truth.append(([float(value) for value in box], label, bool(rng.random() < 0.2)))
            for _ in range(int(rng.integers(0, 4))):
                moved = [float(value) for value in box + rng.normal(0, 6, 4)]
                rows.append((moved, float(rng.random()), label))
        truths.append(truth)
        answers.append(found(*rows))
    return image_set(*truths), answers


@pytest.mark.parametrize("seed", range(5))
def test_is_the_area_that_mmdet_finds(seed: int) -> None:
    from dfq.models.mmdet.config import require_mmdet

    require_mmdet()
    from mmdet.evaluation.functional import mean_ap

    data, answers = case(seed)
    expected = []
    for category in (0, 1):
        rights, wrongs, scores, total = [], [], [], 0
        for item, answer in zip(data.items, answers, strict=True):
            rows = (answer.labels == category).numpy()
            boxes = np.column_stack([answer.boxes.numpy()[rows], answer.scores.numpy()[rows]])
            own = item.labels == category
            plain, difficult = item.boxes[own & ~item.ignore], item.boxes[own & item.ignore]
            right, wrong = mean_ap.tpfp_default(boxes, plain, difficult, 0.5)
            rights.append(right[0])
            wrongs.append(wrong[0])
            scores.append(boxes[:, 4])
            total += len(plain)
        order = np.argsort(-np.concatenate(scores), kind="stable")
        right = np.cumsum(np.concatenate(rights)[order])
        wrong = np.cumsum(np.concatenate(wrongs)[order])
        if total:
            precision = right / np.maximum(right + wrong, 1e-9)
            expected.append(mean_ap.average_precision(right / total, precision, "area"))
    assert expected
    assert voc_ap50(data, answers, NAMES) == pytest.approx(float(np.mean(expected)), abs=1e-6)

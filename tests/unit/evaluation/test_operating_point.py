"""F1 at its best threshold, against cases worked by hand."""

from __future__ import annotations

import math

import pytest
from support.coco_parts import NAMES, found, image_set

from dfq.errors import UserError
from dfq.evaluation.operating_point import best_f1

HERE, THERE, AWAY = [0.0, 0.0, 40.0, 40.0], [50.0, 0.0, 90.0, 40.0], [100.0, 50.0, 140.0, 90.0]


def test_a_case_worked_by_hand() -> None:
    # Three objects. By falling score: right, wrong category, right, wrong, right.
    data = image_set([(HERE, 0, False), (THERE, 1, False)], [(HERE, 0, False)])
    answers = [
        found((HERE, 0.9, 0), (AWAY, 0.8, 2), (THERE, 0.7, 1)),
        found((AWAY, 0.6, 0), (HERE, 0.5, 0)),
    ]
    # F1 after each: 2/4, 2/5, 4/6, 4/7, 6/8.
    best = best_f1(data, answers, NAMES)
    assert best.f1 == pytest.approx(6 / 8)
    assert best.precision == pytest.approx(3 / 5)
    assert best.recall == 1
    assert best.threshold == pytest.approx(0.5)
    # Without the last one, the third is the best.
    answers[1] = found((AWAY, 0.6, 0))
    best = best_f1(data, answers, NAMES)
    assert (best.f1, best.threshold) == (pytest.approx(4 / 6), pytest.approx(0.7))
    assert (best.precision, best.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_equal_scores_share_their_fate() -> None:
    data = image_set([(HERE, 0, False)])
    best = best_f1(data, [found((HERE, 0.5, 0), (AWAY, 0.5, 0), (THERE, 0.5, 1))], NAMES)
    assert best.f1 == pytest.approx(2 * 1 / (3 + 1))
    assert best.precision == pytest.approx(1 / 3)


def test_what_lies_in_an_ignored_object_is_neither_right_nor_wrong() -> None:
    data = image_set([(HERE, 0, False), (AWAY, 0, True)])
    best = best_f1(data, [found((AWAY, 0.9, 0), (HERE, 0.5, 0))], NAMES)
    assert (best.f1, best.precision, best.recall) == (1, 1, 1)


def test_another_overlap() -> None:
    # IoU 0.6.
    data = image_set([([0.0, 0.0, 100.0, 10.0], 0, False)])
    answers = [found(([0.0, 0.0, 60.0, 10.0], 0.9, 0))]
    assert best_f1(data, answers, NAMES).f1 == 1
    assert best_f1(data, answers, NAMES, iou=0.75).f1 == 0


def test_nothing_detected_and_nothing_to_find() -> None:
    nothing = best_f1(image_set([(HERE, 0, False)]), [found()], NAMES)
    assert (nothing.f1, nothing.recall) == (0, 0)
    assert math.isnan(nothing.precision)
    assert math.isnan(nothing.threshold)
    crowd = image_set([(HERE, 0, True)])
    assert math.isnan(best_f1(crowd, [found((HERE, 0.5, 0))], NAMES).f1)
    with pytest.raises(UserError):
        best_f1(image_set([(HERE, 0, False)], names=["x"]), [found()], NAMES)

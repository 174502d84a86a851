"""The adaptive sampler: its updates, their times, and where categories come from."""

from __future__ import annotations

import pytest
import torch
from support.label_rows import NOTHING, SIZE, A, B, found, label
from torch import Generator, Tensor

from dfq.models.base import Detections
from dfq.synthesis.adaptive_labels import (
    FAINT,
    AdaptiveSampler,
    draw_categories,
    update_adaptive,
    update_steps,
)
from dfq.synthesis.settings import LabelStage

CLASSES = 7


CASES = {
    "a found label stays as it is": (label(A), found((0, 12, 10, 40, 42)), label(A)),
    "a new object is added": (label(A), found(A, B), label(A, B)),
    "an unfound label goes": (label(A, B), found(B), label(B)),
    "the last label stays": (label(A), found((0, 60, 60, 64, 64)), label(A)),
    "all labels stay where nothing is found": (label(A, B), NOTHING, label(A, B)),
    # IoU 0.2 with A, none with B: A is the best of the unfound ones.
    "the best overlap stays": (label(B, A), found((0, 30, 10, 60, 40)), None),
    # IoU of [0, 30] and [s, s + 30] (same height) is (30 - s) / (30 + s).
    # B is there besides, or the label would stay as the only one.
    "overlap just above 0.35 keeps and adds nothing": (
        label(B, (1, 0, 0, 30, 30)),
        found(B, (1, 14.4, 0, 44.4, 30)),
        label(B, (1, 0, 0, 30, 30)),
    ),
    "overlap just below 0.35 removes and adds": (
        label(B, (1, 0, 0, 30, 30)),
        found(B, (1, 14.5, 0, 44.5, 30)),
        label(B, (1, 14.5, 0, 44.5, 30)),
    ),
    "too small (under 1 %)": (label(A), found(A, (2, 60, 60, 69, 71)), label(A)),
    "just large enough": (
        label(A),
        found(A, (2, 60, 60, 70, 70.5)),
        label(A, (2, 60, 60, 70, 70.5)),
    ),
    "too large (85 % and more)": (label(A), found(A, (2, 0, 0, 93, 93)), label(A)),
    "just small enough": (label(A), found(A, (2, 0, 0, 92, 92)), label(A, (2, 0, 0, 92, 92))),
    "one object under two categories is added once": (
        label(A),
        found(A, B, (5, 61, 60, 90, 91)),
        label(A, B),
    ),
    "an image without labels gets some": (label(), found(B), label(B)),
    "an image without labels or detections has none": (label(), NOTHING, label()),
    "boxes are cut at the image": (
        label(A),
        found(A, (3, 70, 70, 130, 120)),
        label(A, (3, 70, 70, 100, 100)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_update_adaptive(case: str) -> None:
    before, detections, after = CASES[case]
    (updated,) = update_adaptive([before], [detections], SIZE)
    if after is None:
        # The best overlap keeps its row; the detection (below 0.35 with it) joins.
        after = label(A, (0, 30, 10, 60, 40))
    torch.testing.assert_close(updated, after)


def test_images_are_updated_apart() -> None:
    updated = update_adaptive([label(A), label(B)], [found(A), found(A)], SIZE)
    torch.testing.assert_close(updated[0], label(A))
    torch.testing.assert_close(updated[1], label(B, A))


@pytest.mark.parametrize(
    ("iterations", "start", "stop", "updates", "expected"),
    [
        (100, 0.2, 0.8, 4, {20, 40, 60, 80}),
        (100, 0.0, 1.0, 3, {0, 50, 99}),
        (10, 0.5, 0.5, 3, {5}),
        (1, 0.33, 0.95, 12, {0}),
        (240, 0.25, 0.75, 1, {60}),
    ],
)
def test_update_steps(
    iterations: int, start: float, stop: float, updates: int, expected: set[int]
) -> None:
    assert update_steps(iterations, start=start, stop=stop, updates=updates) == expected


def test_labels_that_are_kept_whatever_is_found() -> None:
    (updated,) = update_adaptive([label(A, B)], [found((3, 0, 60, 30, 90))], SIZE, drop=False)
    torch.testing.assert_close(updated, label(A, B, (3, 0, 60, 30, 90)))
    (updated,) = update_adaptive([label()], [NOTHING], SIZE, drop=False)
    assert not len(updated)


def square(category: int, side: float, wide: float = 1.0) -> tuple[float, ...]:
    return (category, 0.0, 0.0, side * wide, side / wide)


def test_categories_are_as_frequent_as_among_faint_detections() -> None:
    # One size: a quarter of the detections are of category 3, the others of 5.
    detections = [found(*[square(3 if i == 0 else 5, 20) for i in range(4)]) for _ in range(3)]
    before = [label(*[square(0, 20)] * 400)]
    (after,) = draw_categories(before, detections, SIZE, Generator().manual_seed(0))
    assert torch.equal(after[:, 1:], before[0][:, 1:])
    assert before[0][:, 0].eq(0).all()
    assert set(after[:, 0].tolist()) == {3, 5}
    # Three standard deviations of 400 draws are 0.065.
    assert float((after[:, 0] == 3).float().mean()) == pytest.approx(0.25, abs=0.065)


def test_categories_go_with_size_and_shape() -> None:
    # Small, large, wide and tall objects are of four categories.
    shapes = [square(1, 8), square(2, 64), square(3, 30, 2), square(4, 30, 0.5)]
    before = [label(*[(0, *shape[1:]) for shape in shapes]) for _ in range(20)]
    after = draw_categories(before, [found(*shapes)], SIZE, Generator().manual_seed(0))
    assert all(rows[:, 0].tolist() == [1, 2, 3, 4] for rows in after)
    # A label unlike all of them takes the closest; ln area and ln aspect count alike.
    (one,) = draw_categories([label(square(0, 1))], [found(*shapes)], SIZE, Generator())
    assert one[0, 0] == 1


def test_weights_of_categories_fall_with_the_distance() -> None:
    # Areas apart by a factor of e: exp(-1 / (2 * 0.25)) = 0.135 against 1, a share of 0.119.
    detections = [found(square(1, 20), square(2, 20 * 2.718281828**0.5))]
    before = [label(*[square(0, 20)] * 3000)]
    (after,) = draw_categories(before, detections, SIZE, Generator().manual_seed(0))
    assert float((after[:, 0] == 2).float().mean()) == pytest.approx(0.119, abs=0.018)


def test_without_detections_categories_stay() -> None:
    before = [label(A), label()]
    empty = found((4, 10, 10, 10, 30))
    for detections in ([NOTHING, NOTHING], [empty, NOTHING]):
        after = draw_categories(before, detections, SIZE, Generator())
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


class Teacher:
    """Finds one object everywhere, and tells what it was asked."""

    def __init__(self) -> None:
        self.thresholds: list[float] = []

    def detect(self, images: Tensor, **thresholds: float) -> list[Detections]:
        self.thresholds.append(thresholds["score_threshold"])
        return [found(B) for _ in images]


def run(stage: LabelStage, labels: list[Tensor]) -> tuple[list[list[Tensor] | None], Teacher]:
    teacher = Teacher()
    sampler = AdaptiveSampler(teacher.detect, stage, labels, Generator().manual_seed(0))
    images = torch.zeros(len(labels), 3, SIZE, SIZE)
    return [sampler(step, images) for step in range(stage.iterations)], teacher


STAGE = {"iterations": 10, "start": 0.3, "stop": 0.7, "updates": 2, "score_threshold": 0.4}


def test_scattered_labels_get_categories_first_and_keep_their_places() -> None:
    calls, teacher = run(LabelStage(**STAGE), [label(A)])
    assert [step for step, call in enumerate(calls) if call is not None] == [3, 7]
    assert teacher.thresholds == [FAINT, 0.4]
    first, second = calls[3], calls[7]
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first[0], label((B[0], *A[1:])))
    torch.testing.assert_close(second[0], label((B[0], *A[1:]), B))


def test_the_papers_labels_are_dropped_and_added() -> None:
    calls, teacher = run(LabelStage(**STAGE, sampler="paper"), [label(A, B, (0, 0, 60, 30, 90))])
    assert teacher.thresholds == [0.4, 0.4]
    assert calls[3] is not None
    torch.testing.assert_close(calls[3][0], label(B))

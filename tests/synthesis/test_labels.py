"""Starts, the adaptive sampler's rules, teacher scores, and when labels are updated."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from dfq.detectors.base import Detections
from dfq.synthesis.labels import STARTS, teacher_scores, update_adaptive, update_steps

SIZE = 100
CLASSES = 7


def label(*rows: tuple[float, ...]) -> Tensor:
    """Rows of category, x1, y1, x2, y2 in pixels of a 100 px image, as labels."""
    corners = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    boxes = corners[:, 1:] / SIZE
    centre, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return torch.cat([corners[:, :1], centre, sides], dim=1)


def found(*rows: tuple[float, ...]) -> Detections:
    """The same rows as detections, scores falling from 0.9."""
    corners = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    scores = 0.9 - 0.1 * torch.arange(len(corners))
    return Detections(corners[:, 1:], scores, corners[:, 0].long())


NOTHING = found()
A = (1, 10, 10, 40, 40)
B = (2, 60, 60, 90, 90)


@pytest.mark.parametrize("kind", sorted(STARTS))
def test_starts_lie_in_the_image(kind: str) -> None:
    labels = STARTS[kind](Generator().manual_seed(3), 200, CLASSES)
    assert len(labels) == 200
    every = torch.cat(labels)
    assert every.shape[1] == 5
    assert every.dtype == torch.float32
    if kind == "none":
        assert not len(every)
        return
    category, centre, sides = every[:, 0], every[:, 1:3], every[:, 3:]
    assert set(category.int().tolist()) == set(range(CLASSES))
    assert torch.equal(category, category.round())
    assert (centre - sides / 2).min() >= -1e-6
    assert (centre + sides / 2).max() <= 1 + 1e-6
    counts = {len(rows) for rows in labels}
    assert (
        counts == {"adaptive": {1}, "single": {1}, "multi": set(range(1, 7)), "tile": {4, 9}}[kind]
    )
    if kind != "tile":
        assert sides.min() >= 0.2
        assert sides.max() <= 0.8
        # Uniform on [0.2, 0.8]: the mean of some hundred draws is near 0.5.
        assert float(sides.mean()) == pytest.approx(0.5, abs=0.04)


def test_tiles_do_not_overlap() -> None:
    from torchvision.ops import box_convert, box_iou

    for rows in STARTS["tile"](Generator().manual_seed(0), 20, CLASSES):
        overlap = box_iou(*[box_convert(rows[:, 1:], "cxcywh", "xyxy")] * 2)
        assert torch.equal(overlap > 0, torch.eye(len(rows), dtype=torch.bool))


def test_starts_depend_on_the_generator_alone() -> None:
    for start in STARTS.values():
        first, again = (start(Generator().manual_seed(5), 9, 3) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


CASES = {
    "a found label stays as it is": (label(A), found((0, 12, 10, 40, 42)), label(A)),
    "a new object is added": (label(A), found(A, B), label(A, B)),
    "an unfound label goes": (label(A, B), found(B), label(B)),
    "the last label stays": (label(A), NOTHING, label(A)),
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


def test_teacher_scores() -> None:
    labels = [label(A, B, (2, 0, 60, 30, 90)), label(), label(A)]
    detections = [
        found(
            (2, 10, 10, 40, 40),  # A's place, another category
            (2, 60, 60, 90, 89),  # B
            (1, 10, 10, 40, 41),  # A
            (1, 11, 10, 40, 40),  # A again, less sure
            (2, 0, 80, 30, 110),  # the third by an IoU of 0.2
        ),
        found(A),
        NOTHING,
    ]
    first, second, third = teacher_scores(labels, detections, SIZE)
    torch.testing.assert_close(first, torch.tensor([0.7, 0.8, 0.0]))
    assert second.shape == (0,)
    torch.testing.assert_close(third, torch.zeros(1))


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

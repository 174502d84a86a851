"""The loss of Ultralytics' heads against Ultralytics' own, on logits made for hard cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from ultralytics.utils.tal import make_anchors

from dfq.models.ultralytics.assignment import Points, Rule, assign, objects_of, rules_of
from dfq.models.ultralytics.detector import UltralyticsDetector
from dfq.models.ultralytics.head import Branch
from dfq.models.ultralytics.loss import branch_losses

# Large enough for distances that no bin is left for.
HEIGHT, WIDTH, IMAGES = 128, 192, 3
SHAPES = ((16, 24), (8, 12), (4, 6))
PLACES = 16 * 24 + 8 * 12 + 4 * 6
STRIDES = (8, 16, 32)


@pytest.fixture(scope="module", params=["yolo11n", "yolov10n", "yolo26n"])
def detector(request: pytest.FixtureRequest) -> UltralyticsDetector:
    return UltralyticsDetector.from_yaml(f"{request.param}.yaml")


def logits(detector: UltralyticsDetector, seed: int, dtype: torch.dtype = torch.float32) -> Branch:
    """Predictions good enough for objects to quarrel over them."""
    generator = Generator().manual_seed(seed)
    reg_max = detector.module.model[-1].reg_max
    boxes = 3 * torch.randn(IMAGES, 4 * reg_max, PLACES, generator=generator)
    if reg_max == 1:
        boxes = boxes.abs()
    scores = torch.randn(IMAGES, 80, PLACES, generator=generator) - 1
    leaves = [part.to(dtype).requires_grad_() for part in (boxes, scores)]
    return Branch(leaves[0], leaves[1], SHAPES)


def labels(seed: int) -> Tensor:
    """Many that overlap, in no order; some tiny, over the edge, or in one place."""
    generator = Generator().manual_seed(seed)
    rows = torch.rand(24, 6, generator=generator)
    rows[:, 0] = (rows[:, 0] * 2).floor()  # the last image has none
    rows[:, 1] = (rows[:, 1] * 3).floor()
    rows[:6, 4:] *= 0.05
    rows[6:9, 2:] = rows[9, 2:]
    rows[6:10, 0] = 1
    rows[6:10, 1] = torch.arange(4)
    # One that reaches into the image from above and left, which counts as lying away from it.
    rows[10, 2:] = torch.tensor([-0.4, -0.4, 1.0, 1.0])
    # Its edges run through centres of anchor points.
    rows[11, 2:] = torch.tensor([20 / WIDTH, 20 / HEIGHT, 32 / WIDTH, 32 / HEIGHT])
    return rows


def by_ultralytics(
    detector: UltralyticsDetector, branches: list[Branch], rows: Tensor
) -> tuple[Any, Tensor]:
    """Its loss of the branches, and the three terms."""
    criterion = detector.module.init_criterion()
    empty = [torch.zeros(1, 0, *shape) for shape in SHAPES]
    given = [{"boxes": b.boxes, "scores": b.scores, "feats": empty} for b in branches]
    rows = rows[rows[:, 0].argsort(stable=True)]
    batch = {"batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": rows[:, 2:]}
    predictions: Any = given[0]
    if len(given) == 2:
        predictions = {"one2many": given[0], "one2one": given[1]}
    summed, _ = criterion(predictions, batch)
    return criterion, summed / IMAGES


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_ultralytics(
    detector: UltralyticsDetector, seed: int, listed: bool, dtype: torch.dtype
) -> None:
    rows = labels(seed).to(dtype)
    branches = [logits(detector, 10 * seed + i, dtype) for i in range(len(detector._rules))]
    torch.set_default_dtype(dtype)
    try:
        criterion, expected = by_ultralytics(detector, branches, rows)
    finally:
        torch.set_default_dtype(torch.float32)
    rules = rules_of(criterion)
    found = sum(
        weight * branch_losses(branch, rows, STRIDES, rule, listed=listed)[0]
        for branch, (weight, rule) in zip(branches, rules, strict=True)
    )
    assert (expected > 0).all()
    # What keeps from dividing by zero is added to pixels here, to strides there.
    tight = 0.1 if dtype == torch.float64 else 1.0
    torch.testing.assert_close(found, expected, rtol=1e-5 * tight, atol=1e-6 * tight)
    # Weights apart, so that no term's gradient can stand in for another's.
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    leaves = [tensor for branch in branches for tensor in (branch.boxes, branch.scores)]
    ours = torch.autograd.grad((found * weights).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    for mine, own in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-3 * tight, atol=1e-7 * tight)


def test_half_precision_is_read_as_float32(detector: UltralyticsDetector) -> None:
    rows, whole = labels(0), logits(detector, 0)
    halves = [t.detach().bfloat16().requires_grad_() for t in (whole.boxes, whole.scores)]
    floats = [t.detach().float().requires_grad_() for t in halves]
    _, rule = detector._rules[0]
    results = []
    for boxes, scores in (halves, floats):
        loss = branch_losses(Branch(boxes, scores, SHAPES), rows, STRIDES, rule)
        assert loss.dtype == torch.float32
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (boxes, scores))))
    torch.testing.assert_close(results[0][0], results[1][0])
    for half, full in zip(results[0][1:], results[1][1:], strict=True):
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, full.bfloat16())


@pytest.mark.parametrize("listed", [True, False])
def test_no_point_answers_twice_and_each_lies_in_its_box(
    detector: UltralyticsDetector, listed: bool
) -> None:
    rows, branch = labels(1), logits(detector, 1)
    grids = [torch.zeros(1, 0, *s) for s in SHAPES]
    points = Points.of(*make_anchors(grids, torch.tensor(STRIDES), 0.5))
    for _, rule in detector._rules:
        objects = objects_of(rows, (HEIGHT, WIDTH), rule)
        usable = objects.reach.isfinite().all(1)
        assert int(usable.sum()) == len(rows) - 1, "one lies away from the image"
        found = assign(branch, objects, points, rule, 1, listed)
        answers = found.scores > 0
        assert (found.scores <= 1).all()
        point, index = found.point[answers], found.object[answers]
        places = found.image[answers] * PLACES + point
        assert len(places.unique()) == len(places) > 0
        assert torch.equal(objects.image[index], found.image[answers])
        assert usable[index].all()
        assert rule.kept == rule.points or int(index.bincount().max()) <= rule.kept
        at = points.origin[point, 2:]
        low, high = objects.sides[index].chunk(2, 1)
        middle, half = (high - low) / 2, (high + low) / 2
        assert ((at - middle).abs() < half.clamp_min(rule.smallest / 2)).all()


@pytest.mark.parametrize("listed", [True, False])
def test_an_object_that_covers_no_point_is_left_out(listed: bool) -> None:
    # 8 px wide is enlarged to 16, and away from the only points.
    branch = Branch(torch.zeros(1, 4, 4), torch.zeros(1, 2, 4), ((2, 2),))
    points = Points.of(*make_anchors([torch.zeros(1, 0, 2, 2)], [32], 0.5))
    rule = Rule(10, 10, 0.5, 6.0, 1e-9, 16.0, (1.0, 1.0, 1.0))
    objects = objects_of(torch.tensor([[0, 1, 0.5, 0.5, 0.125, 0.125]]), (64, 64), rule)
    assert not assign(branch, objects, points, rule, 1, listed).scores.any()

"""Gradients of YOLOv5's loss against autograd of the definition, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dfq.models.ciou import EPSILON
from dfq.models.yolov5.loss import balance_of, losses

ANCHORS = torch.tensor(
    [[[1.2, 1.6], [2.0, 3.7]], [[1.9, 3.8], [3.9, 2.8]], [[3.6, 2.8], [4.9, 6.2]]]
)
SHAPE, IMAGES, CLASSES = (96, 64), 4, 3


def predictions(generator: Generator) -> list[Tensor]:
    raw = []
    for stride in (8, 16, 32):
        shape = (IMAGES, 2, SHAPE[0] // stride, SHAPE[1] // stride, 5 + CLASSES)
        logits = 2 * torch.randn(shape, generator=generator)
        logits[0, :, :, :, 2:4] = -30  # sides of nothing
        raw.append(logits.double().requires_grad_())
    return raw


def labels(generator: Generator, count: int, first: int) -> Tensor:
    """Of two images; two objects in one place."""
    rows = torch.rand(count, 6, generator=generator)
    rows[:, 0] = first + (rows[:, 0] * 2).floor()
    rows[:, 1] = (rows[:, 1] * CLASSES).floor()
    rows[:, 4:] = 0.1 + 0.6 * rows[:, 4:]
    rows[1, [0, 2, 3]] = rows[0, [0, 2, 3]]
    return rows


def complete_iou(centre: Tensor, sides: Tensor, middle: Tensor, target: Tensor) -> Tensor:
    """Zheng et al., 2020, of a box with a target."""
    low = torch.maximum(centre - sides / 2, middle - target / 2)
    high = torch.minimum(centre + sides / 2, middle + target / 2)
    shared = (high - low).clamp(min=0).prod()
    iou = shared / (sides.prod() + target.prod() - shared + EPSILON)
    low = torch.minimum(centre - sides / 2, middle - target / 2)
    high = torch.maximum(centre + sides / 2, middle + target / 2)
    distance = (centre - middle).square().sum() / ((high - low).square().sum() + EPSILON)
    angles = [torch.atan(s[0] / s[1]) for s in (sides, target)]
    shape = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    share = (shape / (1 - iou + shape + EPSILON)).detach()
    return iou - distance - share * shape


def plain(raw: list[Tensor], rows: Tensor) -> Tensor:
    """Box, objectness and class loss, answer by answer."""
    box, objectness, category = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for logits, sizes, balance in zip(raw, ANCHORS.double(), balance_of(3), strict=True):
        height, width = logits.shape[2:4]
        goal = torch.zeros_like(logits[..., 0])
        boxes, classes = [], []
        for image, label, *shares in rows.double().tolist():
            x, y, w, h = (
                part * side for part, side in zip(shares, (width, height) * 2, strict=True)
            )
            steps = [(0, 0)]
            steps += [(-1, 0)] if x % 1 < 0.5 and x > 1 else []
            steps += [(0, -1)] if y % 1 < 0.5 and y > 1 else []
            steps += [(1, 0)] if (width - x) % 1 < 0.5 and width - x > 1 else []
            steps += [(0, 1)] if (height - y) % 1 < 0.5 and height - y > 1 else []
            for anchor, size in enumerate(sizes):
                ratios = torch.tensor([w, h]).double() / size
                if max(ratios.max(), (1 / ratios).max()) >= 4:
                    continue
                for right, down in steps:
                    column, row = int(x + right / 2), int(y + down / 2)
                    seen = logits[int(image), anchor, row, column]
                    sides = ((2 * seen[2:4].sigmoid()).square() * size).clamp(min=1e-4)
                    centre = 2 * seen[:2].sigmoid() - 0.5 + torch.tensor([column, row])
                    met = torch.tensor([[x, y], [w, h]]).double()
                    overlap = complete_iou(centre, sides, *met)
                    boxes.append(1 - overlap)
                    place = goal[int(image), anchor, row, column]
                    place.copy_(torch.maximum(place, overlap.detach().clamp(min=0)))
                    wanted = torch.zeros(CLASSES, dtype=torch.float64)
                    wanted[int(label)] = 1
                    classes.append(F.binary_cross_entropy_with_logits(seen[5:], wanted))
        box = box + torch.stack(boxes).mean()
        category = category + torch.stack(classes).mean()
        entropy = F.binary_cross_entropy_with_logits(logits[..., 4], goal)
        objectness = objectness + balance * entropy
    area = SHAPE[0] * SHAPE[1] / 640**2
    return torch.stack([0.05 * box, area * objectness, 0.5 * CLASSES / 80 * category])


def require_equal(found: Tensor, expected: Tensor, raw: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    # Weights apart, so that no term's gradient can stand in for another's.
    weights = torch.arange(1, 1 + expected.numel()).view(expected.shape).double()
    ours = torch.autograd.grad((found * weights).sum(), raw)
    theirs = torch.autograd.grad((expected * weights).sum(), raw)
    for mine, own in zip(ours, theirs, strict=True):
        assert own.count_nonzero() > 0
        torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_the_definition(listed: bool, seed: int) -> None:
    generator = Generator().manual_seed(seed)
    raw, rows = predictions(generator), labels(generator, 6, 0)
    found = losses(raw, rows, ANCHORS, SHAPE, listed=listed)[0]
    require_equal(found, plain(raw, rows), raw)


def test_each_batch_has_its_own_gradient() -> None:
    generator = Generator().manual_seed(0)
    raw = predictions(generator)
    rows = [labels(generator, 6, 0), labels(generator, 6, 2)]
    # One that stands for nothing.
    rows[0][5, 0] = -2
    parts = [[level[:2] for level in raw], [level[2:] for level in raw]]
    rows_alone = [rows[0][:5], rows[1] - torch.tensor([2.0, 0, 0, 0, 0, 0])]
    expected = torch.stack([plain(*pair) for pair in zip(parts, rows_alone, strict=True)])
    found = losses(raw, torch.cat(rows), ANCHORS, SHAPE, shards=2, listed=False)
    require_equal(found, expected, raw)

"""CIoU and its gradient against Ultralytics' and torchvision's, by autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor
from torchvision.ops import complete_box_iou_loss
from ultralytics.utils.metrics import bbox_iou

from dfq.models.ciou import area_and_angle, ciou, sides_of

COUNT = 2000


def cases(plain: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Points, and distances of the sides of boxes and targets; with some far apart, and, unless
    plain, some without or of negative area."""
    generator = Generator().manual_seed(0)
    points, boxes, targets = (
        torch.rand(COUNT, width, generator=generator, dtype=torch.float64) for width in (2, 4, 4)
    )
    boxes[1::7] += torch.tensor([3.0, 0, -2.9, 0], dtype=torch.float64)
    if not plain:
        boxes[::7] *= -0.01
        boxes[2::7] = 0
        boxes[3::7] += torch.tensor([3.0, 0, -3.1, 0], dtype=torch.float64)
    return points, boxes, targets


def corners(points: Tensor, distances: Tensor) -> Tensor:
    return torch.cat([points - distances[:, :2], points + distances[:, 2:]], 1)


@pytest.mark.parametrize("original", ["ultralytics", "torchvision"])
def test_values_and_gradients_are_the_originals(original: str) -> None:
    points, boxes, targets = cases(plain=original == "torchvision")
    leaf = boxes.clone().requires_grad_()
    pair = corners(points, leaf), corners(points, targets)
    if original == "ultralytics":
        expected, tight = bbox_iou(*pair, xywh=False, CIoU=True).squeeze(1), 1e-9
    else:
        # It leaves heights as they are.
        expected, tight = 1 - complete_box_iou_loss(*pair), 1e-4
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    found = ciou(boxes, targets, sides_of(boxes), *area_and_angle(sides_of(targets)))
    assert 0 < int((found.iou == 0).sum()) < 2 * COUNT / 3
    torch.testing.assert_close(found.value, expected.detach(), rtol=tight, atol=tight)
    torch.testing.assert_close(found.gradient(), slope, rtol=tight, atol=tight)


def test_rows_are_those_of_what_was_broadcast() -> None:
    _, boxes, targets = cases(plain=True)
    boxes, targets = boxes[:6].view(2, 3, 4), targets[:2, None]
    both = ciou(boxes, targets, sides_of(boxes), *area_and_angle(sides_of(targets)))
    index = torch.tensor([5, 0, 5])
    rows, whole = both.rows(index), both.gradient().view(6, 4)
    assert torch.equal(rows.value, both.value.view(6)[index])
    torch.testing.assert_close(rows.gradient(), whole[index])

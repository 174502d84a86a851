"""The training loss of the original YOLOv5 (v6 and v7 defaults), as functions of its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou_loss

BOX_GAIN = 0.05
OBJECTNESS_GAIN = 1.0
CLASS_GAIN = 0.5
ANCHOR_RATIO = 4.0
_NEIGHBOUR = 0.5
_SMALLEST_SIDE = 1e-4


@dataclass(frozen=True)
class Assignment:
    """The `k` predictions of one level that answer for an object.

    Attributes:
        image, anchor, row, column: int64 `(k,)`, the place of the prediction.
        category: int64 `(k,)`.
        boxes: float `(k, 4)`: centre relative to the cell's corner, width and height, in cells.
    """

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    category: Tensor
    boxes: Tensor


def assign(targets: Tensor, anchors: Tensor, height: int, width: int) -> Assignment:
    """Choose the predictions of one level that answer for the targets.

    An anchor answers when neither side is more than `ANCHOR_RATIO` times the object's or the
    reverse. It does so in the cell of the object's centre and in up to two neighbours: those that
    touch the half of the cell the centre lies in, and that exist.

    Args:
        targets: `(n, 6)`: image, category, cx, cy, w, h in [0, 1].
        anchors: `(a, 2)` in cells.
        height, width: cells.
    """
    sides = targets.new_tensor([width, height])
    centres, sizes = targets[:, 2:4] * sides, targets[:, 4:6] * sides

    ratio = sizes[None] / anchors[:, None]
    fits = torch.maximum(ratio, 1 / ratio).amax(dim=2) < ANCHOR_RATIO
    anchor, index = fits.nonzero(as_tuple=True)
    centres, sizes = centres[index], sizes[index]

    opposite = sides - centres
    left_top = (centres % 1 < _NEIGHBOUR) & (centres > 1)
    right_bottom = (opposite % 1 < _NEIGHBOUR) & (opposite > 1)
    chosen = torch.cat([torch.ones_like(left_top[:, :1]), left_top, right_bottom], dim=1)
    pair, direction = chosen.nonzero(as_tuple=True)
    shifts = _NEIGHBOUR * targets.new_tensor([[0, 0], [-1, 0], [0, -1], [1, 0], [0, 1]])

    centres, sizes, anchor, index = centres[pair], sizes[pair], anchor[pair], index[pair]
    cells = (centres + shifts[direction]).long()
    column, row = cells[:, 0].clamp(0, width - 1), cells[:, 1].clamp(0, height - 1)
    corner = torch.stack([column, row], dim=1)
    return Assignment(
        image=targets[index, 0].long(),
        anchor=anchor,
        row=row,
        column=column,
        category=targets[index, 1].long(),
        boxes=torch.cat([centres - corner, sizes], dim=1),
    )


def boxes_of(logits: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Box logits `(..., 4)` to centres `2σ - 0.5` relative to the cell's corner and sizes
    `(2σ)² · anchor`, each `(..., 2)` in the unit of `anchors` (broadcastable to `(..., 2)`)."""
    doubled = logits.sigmoid() * 2
    return doubled[..., :2] - 0.5, doubled[..., 2:4] ** 2 * anchors


def yolov5_loss(
    raw: list[Tensor], targets: Tensor, anchors: Tensor, image_shape: tuple[int, int]
) -> dict[str, Tensor]:
    """Box (CIoU), objectness and class loss of a batch, gains applied, means over the batch.

    Where several objects claim one prediction its objectness target is the largest of their IoUs
    (the original's `sort_obj_iou`), so that the loss does not depend on the order of writes.

    Args:
        raw: logits `(n, anchors, h, w, 5 + classes)` a level.
        targets: `(m, 6)`: image, category, cx, cy, w, h in [0, 1]; may be empty.
        anchors: `(levels, anchors, 2)` in cells.
        image_shape: height and width in pixels.

    Returns:
        Scalars "box", "objectness" and "class" (zero where there is one category, which the
        original does not train).
    """
    box = objectness = category = raw[0].new_zeros(())
    balance = [4.0, 1.0, 0.4] if len(raw) == 3 else [4.0, 1.0, 0.25, 0.06, 0.02]
    for logits, sizes, weight in zip(raw, anchors, balance, strict=False):
        box_term, objectness_term, class_term = _level(logits, targets, sizes)
        box = box + box_term
        objectness = objectness + weight * objectness_term
        category = category + class_term

    classes = raw[0].shape[-1] - 5
    per_level = 3 / len(raw)
    area = image_shape[0] * image_shape[1] / 640**2
    return {
        "box": box * (BOX_GAIN * per_level),
        "objectness": objectness * (OBJECTNESS_GAIN * area * per_level),
        "class": category * (CLASS_GAIN * classes / 80 * per_level),
    }


def _level(logits: Tensor, targets: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, count, height, width, outputs = logits.shape
    found = assign(targets, anchors, height, width)
    picked = logits[found.image, found.anchor, found.row, found.column]
    k = max(len(picked), 1)

    centres, sizes = boxes_of(picked[:, :4], anchors[found.anchor])
    # CIoU divides by the height, and a sigmoid may underflow to zero.
    predicted = _corners(centres, sizes.clamp(min=_SMALLEST_SIDE))
    wanted = _corners(found.boxes[:, :2], found.boxes[:, 2:])
    box_losses = complete_box_iou_loss(predicted, wanted)

    place = ((found.image * count + found.anchor) * height + found.row) * width + found.column
    overlap = (1 - box_losses.detach()).clamp(min=0).to(logits.dtype)
    wanted_objectness = logits.new_zeros(n * count * height * width)
    wanted_objectness = wanted_objectness.scatter_reduce(0, place, overlap, "amax")
    objectness = F.binary_cross_entropy_with_logits(logits[..., 4].flatten(), wanted_objectness)

    classes = outputs - 5
    if classes == 1:
        return box_losses.sum() / k, objectness, picked[:, 5:].sum() * 0
    # Not F.one_hot, which waits for the device to look at its input.
    one_hot = torch.zeros_like(picked[:, 5:]).scatter(1, found.category[:, None], 1.0)
    class_sum = F.binary_cross_entropy_with_logits(picked[:, 5:], one_hot, reduction="sum")
    return box_losses.sum() / k, objectness, class_sum / (k * classes)


def _corners(centres: Tensor, sizes: Tensor) -> Tensor:
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)

"""The training loss of the original YOLOv5 (v6 and v7 defaults), as functions of its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    directions = torch.cat([torch.ones_like(left_top[:, :1]), left_top, right_bottom], dim=1)
    pair, direction = directions.nonzero(as_tuple=True)
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
    sides = doubled[..., 2:4]
    # Not a power: LiteRT has none of five dimensions.
    return doubled[..., :2] - 0.5, sides * sides * anchors


class _Read(torch.autograd.Function):
    """All that the loss looks at of a level: `k` whole predictions `(k, 5 + classes)` and every
    objectness `(n, anchors, h, w)`, in float32.

    The gradient of the level is then filled in once, where indexing and slicing would each make
    and add up one of its own, nearly all zeros.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *place: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, *place)
        return logits[place].float(), logits[..., 4].float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, picked: Tensor, objectness: Tensor) -> Any:
        logits, *place = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        grad[..., 4] = objectness
        grad.index_put_(tuple(place), picked.to(grad.dtype), accumulate=True)
        return grad, *(None for _ in place)


def balance_of(levels: int) -> list[float]:
    """Weights of the levels' objectness, finest first."""
    return [4.0, 1.0, 0.4] if levels == 3 else [4.0, 1.0, 0.25, 0.06, 0.02][:levels]


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
    # Level by level what is looked at; then all levels at once, for what is done with it is many
    # operations on few values.
    rows, objectness_logits, priors, target_boxes, categories, places = [], [], [], [], [], []
    share, weight, offset = [], [], 0
    for logits, sizes, level_weight in zip(raw, anchors, balance_of(len(raw)), strict=False):
        _, count, height, width, outputs = logits.shape
        assignment = assign(targets, sizes, height, width)
        picked, objectness = _Read.apply(
            logits, assignment.image, assignment.anchor, assignment.row, assignment.column
        )
        cells = objectness.numel()
        place = (
            (assignment.image * count + assignment.anchor) * height + assignment.row
        ) * width + assignment.column
        rows.append(picked)
        objectness_logits.append(objectness.flatten())
        priors.append(sizes[assignment.anchor])
        target_boxes.append(assignment.boxes)
        categories.append(assignment.category)
        places.append(place + offset)
        # Each level is a mean of its own.
        share.append(picked.new_full((len(picked),), 1 / max(len(picked), 1)))
        weight.append(objectness.new_full((cells,), level_weight / cells))
        offset += cells

    logits, shares = torch.cat(rows), torch.cat(share)
    centres, sizes = boxes_of(logits[:, :4], torch.cat(priors))
    # CIoU divides by the height, and a sigmoid may underflow to zero.
    predicted = _corners(centres, sizes.clamp(min=_SMALLEST_SIDE))
    boxes = torch.cat(target_boxes)
    box_losses = complete_box_iou_loss(predicted, _corners(boxes[:, :2], boxes[:, 2:]))

    overlap = (1 - box_losses.detach()).clamp(min=0)
    target_objectness = overlap.new_zeros(offset)
    target_objectness.scatter_reduce_(0, torch.cat(places), overlap, "amax")
    objectness_loss = F.binary_cross_entropy_with_logits(
        torch.cat(objectness_logits), target_objectness, torch.cat(weight), reduction="sum"
    )

    classes = outputs - 5
    scores = logits[:, 5:]
    if classes == 1:
        class_loss = scores.sum() * 0
    else:
        # Not F.one_hot, which waits for the device to look at its input.
        one_hot = torch.zeros_like(scores).scatter_(1, torch.cat(categories)[:, None], 1.0)
        class_losses = F.binary_cross_entropy_with_logits(
            scores, one_hot, shares[:, None], reduction="sum"
        )
        class_loss = class_losses / classes
    per_level = 3 / len(raw)
    area = image_shape[0] * image_shape[1] / 640**2
    return {
        "box": (box_losses * shares).sum() * (BOX_GAIN * per_level),
        "objectness": objectness_loss * (OBJECTNESS_GAIN * area * per_level),
        "class": class_loss * (CLASS_GAIN * classes / 80 * per_level),
    }


def _corners(centres: Tensor, sizes: Tensor) -> Tensor:
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)

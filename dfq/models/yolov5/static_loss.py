"""The training loss of `yolov5_loss` where no shape depends on values, for several batches at once.

There, what answers for an object is looked for and listed, and how much that is the processor has
to know before it goes on. Here every object has all the places that could answer for it, and those
that do not count for nothing: a GPU runs through without waiting, and a recording of it stays valid
for other objects.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss import (
    _NEIGHBOUR,
    _SMALLEST_SIDE,
    ANCHOR_RATIO,
    BOX_GAIN,
    CLASS_GAIN,
    OBJECTNESS_GAIN,
    _corners,
    balance_of,
    boxes_of,
)


@functools.lru_cache(maxsize=64)
def _constants(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sides of a level in cells `(2,)`, and where from a centre an answer may be `(5, 2)`."""
    directions = [[0.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [1.0, 0.0], [0.0, 1.0]]
    shifts = _NEIGHBOUR * torch.tensor(directions)
    return torch.tensor([float(width), float(height)]).to(device), shifts.to(device)


@functools.lru_cache(maxsize=64)
def _cell_weights(
    cells: tuple[int, ...], weights: tuple[float, ...], device: torch.device
) -> Tensor:
    per_level = [torch.full((n,), w / n) for n, w in zip(cells, weights, strict=True)]
    return torch.cat(per_level).to(device)


class _Read(torch.autograd.Function):
    """Of predictions `(all, 5 + classes)`, those at `k` places, of which some may be given twice,
    and every objectness; in float32."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(flat, place)
        return flat.index_select(0, place).float(), flat[:, 4].float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, picked: Tensor, objectness: Tensor) -> tuple[Tensor, None]:
        flat, place = ctx.saved_tensors
        grad = torch.zeros_like(flat)
        grad[:, 4] = objectness
        return grad.index_add_(0, place, picked.to(grad.dtype)), None


def box_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """What torchvision's `complete_box_iou_loss` gives (Zheng et al., 2020), which picks the boxes
    that overlap, and waits for the device to say how many they are.

    Args:
        predicted, target: `(k, 4)`, x1 y1 x2 y2.

    Returns:
        `(k,)`.
    """
    epsilon = 1e-7
    low, high = predicted[:, :2], predicted[:, 2:]
    low_target, high_target = target[:, :2], target[:, 2:]
    inner = torch.minimum(high, high_target) - torch.maximum(low, low_target)
    overlap = torch.where((inner > 0).all(dim=1), inner[:, 0] * inner[:, 1], 0.0)
    sides, target_sides = high - low, high_target - low_target
    union = sides[:, 0] * sides[:, 1] + target_sides[:, 0] * target_sides[:, 1] - overlap
    iou = overlap / (union + epsilon)
    outer = torch.maximum(high, high_target) - torch.minimum(low, low_target)
    away = (low + high - low_target - high_target) / 2
    distance = away.square().sum(1) / (outer.square().sum(1) + epsilon)
    angles = torch.atan(torch.stack([s[:, 0] / s[:, 1] for s in (target_sides, sides)]))
    shape = (4 / math.pi**2) * (angles[0] - angles[1]).square()
    with torch.no_grad():
        share = shape / (1 - iou + shape + epsilon)
    return 1 - iou + distance + share * shape


def shard_losses(
    raw: list[Tensor], targets: Tensor, anchors: Tensor, image_shape: tuple[int, int], shards: int
) -> Tensor:
    """The sum of the terms of `yolov5_loss` for each of several batches of one size.

    Args:
        raw: logits `(shards * n, anchors, h, w, 5 + classes)` a level, one batch after the other.
        targets: float32 `(shards * m, 6)`, those of a batch after those of the one before: image
            (of all), category, cx, cy, w, h in [0, 1]. Where the image is negative, the row stands
            for nothing; it is looked for in image `-1 - image`.
        anchors: `(levels, anchors, 2)` in cells.
        image_shape: height and width in pixels.
        shards: how many batches.

    Returns:
        Float32 `(shards,)`.
    """
    present = targets[:, 0] >= 0
    image = torch.where(present, targets[:, 0], -1 - targets[:, 0]).long()[:, None, None]
    category = targets[:, 1].long()
    per_shard = len(raw[0]) // shards
    shard = image // per_shard
    balance = balance_of(len(raw))
    counts = [level[0, ..., 0].numel() * per_shard for level in raw]
    cells_per_shard = sum(counts)
    rows, objectness_logits, priors, target_boxes, places, share, used = [], [], [], [], [], [], []
    offset = 0
    for logits, sizes, cells in zip(raw, anchors, counts, strict=False):
        _, count, height, width, outputs = logits.shape
        sides, shifts = _constants(height, width, logits.device)
        centres, extent = targets[:, 2:4] * sides, targets[:, 4:6] * sides
        # Objects, anchors, directions: (t, a, 5).
        ratio = extent[:, None] / sizes
        fits = torch.maximum(ratio, 1 / ratio).amax(dim=2) < ANCHOR_RATIO
        opposite = sides - centres
        left_top = (centres % 1 < _NEIGHBOUR) & (centres > 1)
        right_bottom = (opposite % 1 < _NEIGHBOUR) & (opposite > 1)
        directions = torch.cat([present[:, None], left_top, right_bottom], dim=1)
        answers = fits[:, :, None] & directions[:, None] & present[:, None, None]
        cell = (centres[:, None] + shifts).long()
        column, row = cell[..., 0].clamp(0, width - 1), cell[..., 1].clamp(0, height - 1)
        corner = torch.stack([column, row], dim=2)
        boxes = torch.cat(
            [centres[:, None] - corner, extent[:, None].expand(-1, len(shifts), -1)], dim=2
        )
        anchor = torch.arange(count, device=logits.device)[:, None]
        place = ((image * count + anchor) * height + row[:, None]) * width + column[:, None]
        picked, objectness = _Read.apply(logits.reshape(-1, outputs), place.flatten())
        # Of the level among all, to that of all levels of the shard.
        places.append((place + shard * (cells_per_shard - cells) + offset).flatten())
        rows.append(picked)
        objectness_logits.append(objectness.reshape(shards, cells))
        priors.append(sizes[None, :, None].expand(*answers.shape, 2).reshape(-1, 2))
        target_boxes.append(boxes[:, None].expand(-1, count, -1, -1).reshape(-1, 4))
        answering = answers.reshape(shards, -1).float()
        # Each level is a mean of its own.
        share.append(answering / answering.sum(1, keepdim=True).clamp_min(1))
        used.append(answers.flatten())
        offset += cells

    logits, shares = torch.cat(rows), torch.cat([part.flatten() for part in share])
    centres, extent = boxes_of(logits[:, :4], torch.cat(priors))
    predicted = _corners(centres, extent.clamp(min=_SMALLEST_SIDE))
    boxes = torch.cat(target_boxes)
    box_losses = box_loss(predicted, _corners(boxes[:, :2], boxes[:, 2:]))

    overlap = (1 - box_losses.detach()).clamp(min=0) * torch.cat(used)
    target_objectness = overlap.new_zeros(shards * cells_per_shard)
    target_objectness.scatter_reduce_(0, torch.cat(places), overlap, "amax")
    weights = _cell_weights(tuple(counts), tuple(balance), logits.device)
    objectness_losses = F.binary_cross_entropy_with_logits(
        torch.cat(objectness_logits, dim=1),
        target_objectness.view(shards, cells_per_shard),
        weights,
        reduction="none",
    )

    def by_shard(values: Tensor) -> Tensor:
        """Sums of `(levels * rows of a level,)`."""
        return values.view(len(raw), shards, -1).sum(dim=(0, 2))

    classes = outputs - 5
    per_level = 3 / len(raw)
    area = image_shape[0] * image_shape[1] / 640**2
    total = by_shard(box_losses * shares) * (BOX_GAIN * per_level)
    total = total + objectness_losses.sum(1) * (OBJECTNESS_GAIN * area * per_level)
    if classes == 1:
        return total
    scores = logits[:, 5:]
    answers_each = len(scores) // len(raw) // len(category)
    target_classes = category[None, :, None].expand(len(raw), -1, answers_each).reshape(-1, 1)
    one_hot = torch.zeros_like(scores).scatter_(1, target_classes, 1.0)
    class_losses = F.binary_cross_entropy_with_logits(
        scores, one_hot, shares[:, None], reduction="none"
    )
    class_loss = by_shard(class_losses.sum(1)) / classes
    return total + class_loss * (CLASS_GAIN * classes / 80 * per_level)

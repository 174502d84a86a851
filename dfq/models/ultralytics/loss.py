"""The training loss of Ultralytics' anchor-free heads, as a function of their logits.

Values and gradients are those of Ultralytics' own loss. Boxes are decoded where they are looked at
alone, and the gradient is written out: by autograd it would take hundreds of operations on a few
values, which a GPU, and a small network on a CPU, takes longer to start than to do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics.utils.tal import make_anchors

from .assignment import Points, Rule, assign, bins_of, objects_of, wide
from .head import Branch


@functools.lru_cache(maxsize=16)
def _points(
    shapes: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device
) -> tuple[Points, Tensor]:
    """The anchor points, and the sides of an image in pixels, float32 `(4,)`: w, h, w, h."""
    levels = [torch.empty(1, 0, *shape) for shape in shapes]
    points = Points.of(*make_anchors(levels, torch.tensor(strides), 0.5))
    sides = torch.tensor([shapes[0][1], shapes[0][0]] * 2) * float(strides[0])
    return Points(points.strides.to(device), points.origin.to(device)), sides.to(device)


@functools.lru_cache(maxsize=64)
def _gains(gains: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(gains, dtype=dtype).to(device)


class _BranchLoss(torch.autograd.Function):
    """See `branch_losses`."""

    @staticmethod
    def forward(
        ctx: Any, boxes: Tensor, scores: Tensor, targets: Tensor, shapes: Any,
        strides: tuple[int, ...], rule: Rule, shards: int, listed: bool,
    ) -> Tensor:  # fmt: skip
        points, image_sides = _points(shapes, strides, boxes.device)
        size = shapes[0][0] * strides[0], shapes[0][1] * strides[0]
        objects = objects_of(targets, size, rule)
        branch = Branch(boxes, scores, shapes)
        assigned = assign(branch, objects, points, rule, shards, listed)
        weight = assigned.scores.view(shards, -1)
        total = weight.sum(1, keepdim=True).clamp_(min=1)

        # As they lie in memory, place after place.
        logits, rows = (part.mT.flatten(0, 1) for part in (scores, boxes))
        place = assigned.image * len(points.strides) + assigned.point
        value = place * logits.shape[1] + objects.category[assigned.object]
        positive = wide(logits.reshape(-1).index_select(0, value))
        picked = wide(rows.index_select(0, place))
        stride = points.strides[assigned.point]
        goals = assigned.distances / stride
        if picked.shape[1] > 4:
            probable = picked.unflatten(1, (4, -1)).log_softmax(2)
            bins = bins_of(probable.shape[2], probable.dtype, probable.device)
            # Of the two bins next to a distance each has what it is nearer than the other.
            goals = goals.clamp_(0, len(bins) - 1.01)[..., None]
            goals = (1 - (goals - bins).abs_()).clamp_(min=0)
            distance = (goals * probable).sum((1, 2)).mul_(-0.25)
            kept = (probable, goals)
        else:
            shares = stride / image_sides
            kept = (picked.sub_(goals), shares)
            distance = (picked * shares).abs_().mean(1)
        terms = torch.stack([1 - assigned.overlaps.value, -positive, distance], 1)
        terms = (weight[:, None] @ terms.view(shards, -1, 3))[:, 0]
        terms[:, 1] += F.softplus(wide(logits)).view(shards, -1).sum(1)
        gains = _gains(rule.gains, terms.dtype, terms.device)
        ctx.save_for_backward(boxes, scores, place, value, weight, total, gains, stride, *kept)
        ctx.overlaps = assigned.overlaps
        return terms.mul_(gains).div_(total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        boxes, scores, place, value, weight, total, gains, stride, *kept = ctx.saved_tensors
        factors = grad * gains / total
        shards = len(factors)
        logits = scores.mT.flatten(0, 1)
        slope = wide(logits).sigmoid()
        slope.view(-1).index_add_(0, value, weight.view(-1), alpha=-1)
        slope.view(shards, -1).mul_(factors[:, 1:2])

        by_row = (weight[..., None] * factors[:, None]).view(-1, 3)
        pull = ctx.overlaps.gradient().mul_(stride * by_row[:, :1])
        away = by_row[:, 2:] * 0.25
        if len(kept[0].shape) == 3:
            probable, goals = kept
            bins = bins_of(probable.shape[2], probable.dtype, probable.device)
            shares = probable.exp()
            through = torch.ops.aten._softmax_backward_data(
                pull[..., None] * bins, shares, 2, shares.dtype
            )
            picked = shares.sub_(goals).mul_(away[..., None]).sub_(through).flatten(1)
        else:
            apart, shares = kept
            picked = apart.sign().mul_(shares).mul_(away).sub_(pull)
        rows = boxes.mT.flatten(0, 1)
        whole = torch.zeros_like(rows).index_add_(0, place, picked.to(rows.dtype))
        return (
            whole.view_as(boxes.mT).mT,
            slope.to(scores.dtype).view_as(scores.mT).mT,
            *[None] * 6,
        )


def branch_losses(
    branch: Branch,
    targets: Tensor,
    strides: tuple[int, ...],
    rule: Rule,
    *,
    shards: int = 1,
    listed: bool = True,
) -> Tensor:
    """Box (CIoU), class and distance loss of one branch for each of several batches of one size,
    `(shards, 3)`, gains applied.

    Each is divided by the sum of the scores that the assigned points are to have, at least 1.

    Args:
        branch: logits, of any floating type, one batch after the other; what is read of them is
            computed with in float32 at least.
        targets: float32 `(m, 6)`: image (of all), category, cx, cy, w, h in [0, 1]; may be empty.
            Of several batches as many rows each, those of a batch after those of the one before;
            where the image is negative, a row stands for nothing, and counts as one of image
            `-1 - image`.
        strides: of the levels, pixels.
        rule: of the branch.
        shards: how many batches.
        listed: whether shapes may depend on values, which takes less memory; of one batch alone.
    """
    losses: Tensor = _BranchLoss.apply(
        branch.boxes, branch.scores, targets, branch.shapes, strides, rule, shards, listed
    )
    return losses

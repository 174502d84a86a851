"""The training loss of `ultralytics_loss` where no shape depends on values, for several batches at
once.

There, pairs of an object and a point in its box are listed. Here there is a place for every object
and every point, as in Ultralytics' own loss; and for as many answers as there can be.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics.utils.ops import xywh2xyxy

from .head import Branch
from .loss import Points, Rule, _boxes, _focal, _inside, _overlaps


class _Rows(torch.autograd.Function):
    """What a branch predicts at places of which some may be given twice: `(k, c)` of `(all, c)`, in
    float32."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(values, place)
        return values.index_select(0, place).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        values, place = ctx.saved_tensors
        return torch.zeros_like(values).index_add_(0, place, grad.to(values.dtype)), None


class _CrossEntropy(torch.autograd.Function):
    """As that of `ultralytics_loss`, of logits `(all, classes)`, summed by shard: `(shards,)`;
    values, numbered one after the other, may be named twice, with scores that add up."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, value: Tensor, target_scores: Tensor, shards: int
    ) -> Tensor:
        ctx.save_for_backward(logits, value, target_scores)
        positive = logits.view(-1).index_select(0, value).float() * target_scores
        totals = F.softplus(logits.float()).view(shards, -1).sum(1)
        return totals - positive.view(shards, -1).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, value, target_scores = ctx.saved_tensors
        slope = logits.float().sigmoid()
        slope.view(-1).index_add_(0, value, -target_scores)
        slope = slope.view(len(grad), -1) * grad[:, None]
        return slope.view_as(logits).to(logits.dtype), None, None, None


def _best(values: Tensor, count: int) -> Tensor:
    """Which of the values `(t, A)` are among their row's largest."""
    largest = values.topk(min(count, values.shape[1]), dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, largest, True)


@torch.no_grad()
def _assign(
    branch: Branch, image: Tensor, category: Tensor, boxes: Tensor, usable: Tensor,
    points: Points, rule: Rule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For each point of each image the object that it answers for, int64 `(n, A)`, -1 for none;
    and for each pair of an object and a point the class score it is to have if so, `(t, A)`.

    Args:
        image, category: int64 `(t,)`.
        boxes: `(t, 4)`, x1 y1 x2 y2 in pixels.
        usable: bool `(t,)`: which objects there are.
    """
    count, places = len(branch.boxes), len(points.centres)
    inside = _inside(boxes, points, rule.smallest) & usable[:, None]
    rows = branch.boxes.mT.float().flatten(0, 1)
    centres = points.centres.expand(count, -1, -1).reshape(-1, 2)
    predicted = (_boxes(rows, centres).view(count, places, 4) * points.strides)[image]
    overlap = _overlaps_of_all(boxes, predicted).clamp_(0) * inside
    score = branch.scores[image, category].float().sigmoid()
    metric = score.pow(rule.score_power) * overlap.pow(rule.overlap_power) * inside
    positive = _best(metric, rule.points) & inside

    # A point that several objects chose goes to the one in whose box it lies that it meets best,
    # the first of equals, whether or not that one chose it.
    claims = torch.zeros(count, places, dtype=torch.int32, device=boxes.device)
    claims.index_add_(0, image, positive.int())
    where = image[:, None].expand_as(overlap)
    best = overlap.new_zeros(count, places).scatter_reduce_(0, where, overlap, "amax")
    order = torch.arange(len(image), device=image.device)[:, None].expand_as(overlap)
    equals = inside & (overlap == best[image])
    first = torch.full_like(claims, len(image), dtype=torch.int64)
    candidates = torch.where(equals, order, len(image))
    first.scatter_reduce_(0, where, candidates, "amin")
    positive = torch.where(claims[image] > 1, first[image] == order, positive) & inside
    if rule.kept != rule.points:
        positive &= _best(metric * positive, rule.kept)

    # The best of an object's points is to score what it overlaps, the others in proportion.
    top = (metric * positive).amax(1, keepdim=True), (overlap * positive).amax(1, keepdim=True)
    owner = torch.full_like(first, -1)
    owner.scatter_reduce_(0, where, torch.where(positive, order, -1), "amax")
    return owner, metric * top[1] / (top[0] + rule.epsilon)


def _overlaps_of_all(boxes: Tensor, predicted: Tensor) -> Tensor:
    """CIoU of boxes `(t, 4)` with `(t, A, 4)`: `(t, A)`."""
    expanded = boxes[:, None].expand_as(predicted)
    return _overlaps(expanded.reshape(-1, 4), predicted.reshape(-1, 4)).view(predicted.shape[:2])


def _listed(owner: Tensor, shards: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The places that answer for an object: image and point, int64 `(shards * most,)`, and which of
    them are any; the others are places too, of no account."""
    count, points = owner.shape
    flat = (owner >= 0).view(shards, -1)
    number = flat.long().cumsum(1)
    places = torch.arange(flat.shape[1], device=owner.device).expand_as(flat)
    spread = torch.arange(most + 1, device=owner.device) % flat.shape[1]
    listed = spread.repeat(shards, 1)
    listed.scatter_(1, torch.where(flat, number - 1, most).clamp_max(most), places)
    listed = listed[:, :most]
    real = torch.arange(most, device=owner.device) < number[:, -1:]
    listed = torch.where(real, listed, spread[:most])
    shard = torch.arange(shards, device=owner.device)[:, None] * (count // shards)
    return (shard + listed // points).flatten(), (listed % points).flatten(), real.flatten()


def branch_losses(
    branch: Branch, targets: Tensor, points: Points, size: Tensor, rule: Rule, shards: int
) -> Tensor:
    """The sum of the terms of `branch_loss` for each of several batches of one size, `(shards,)`.

    Args:
        branch: logits, one batch after the other.
        targets: float32 `(shards * m, 6)`, those of a batch after those of the one before: image
            (of all), category, cx, cy, w, h in [0, 1]; where the image is negative, the row stands
            for nothing, and counts as one of image `-1 - image`.
        points: of the branch.
        size: float32 `(4,)`: width, height, width, height of an image, pixels.
        rule: of the branch.
        shards: how many batches.
    """
    present = targets[:, 0] >= 0
    image = torch.where(present, targets[:, 0], -1 - targets[:, 0]).long()
    category, boxes = targets[:, 1].long(), xywh2xyxy(targets[:, 2:6] * size)
    usable = present & (boxes.sum(1) > 0)
    owner, scores = _assign(branch, image, category, boxes, usable, points, rule)
    most = len(targets) // shards * rule.points
    image, point, real = _listed(owner, shards, most)
    index = owner[image, point].clamp_min(0)
    target_scores = scores[index, point] * real
    total = target_scores.view(shards, -1).sum(1).clamp_min(1)

    # As they lie in memory, place after place.
    values, rows = (part.mT.flatten(0, 1) for part in (branch.scores, branch.boxes))
    place = image * len(points.centres) + point
    value = place * values.shape[1] + category[index]
    entropy = _CrossEntropy.apply(values.contiguous(), value, target_scores, shards)
    logits = _Rows.apply(rows, place)
    centres, scale = points.centres[point], points.strides[point]
    met = boxes[index] / scale
    box = (1 - _overlaps(_boxes(logits, centres), met)) * target_scores
    away = torch.cat([centres - met[:, :2], met[:, 2:] - centres], dim=1)
    reg_max = logits.shape[1] // 4
    if reg_max > 1:
        distance = _focal(logits.unflatten(1, (4, reg_max)), away)
    else:
        distance = ((logits - away) * (scale / size)).abs()
    distance = distance.mean(1) * target_scores
    parts = (box.view(shards, -1).sum(1), entropy, distance.view(shards, -1).sum(1))
    gained = [gain * part for gain, part in zip(rule.gains, parts, strict=True)]
    return torch.stack(gained).sum(0) / total

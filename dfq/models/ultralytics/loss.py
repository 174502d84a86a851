"""The training loss of Ultralytics' anchor-free heads, as a function of their logits.

Objects get their anchor points by task-aligned assignment (Feng et al., 2021): of the points in an
object's box those at which the class is scored and the box is met best. Ultralytics' own loss looks
for that at every class of every point of every object. Here only pairs of an object and a point in
its box are looked at, and boxes are decoded there alone; values and gradients are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics.utils.loss import v8DetectionLoss
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.ops import xywh2xyxy, xyxy2xywh
from ultralytics.utils.tal import make_anchors

from .head import Branch

_INSIDE = 1e-9
"""Pixels that a point has to lie within a box at least."""


@dataclass(frozen=True)
class Rule:
    """How Ultralytics trains a branch.

    Attributes:
        points: how many anchor points an object gets at most.
        kept: how many of them it keeps where several objects wanted some.
        score_power, overlap_power: of class score and overlap, whose product ranks the points.
        epsilon: keeps the largest product of an object from being zero.
        smallest: side of a box, pixels, below which points are looked for in so large a one.
        gains: of box, class and distance loss.
    """

    points: int
    kept: int
    score_power: float
    overlap_power: float
    epsilon: float
    smallest: float
    gains: tuple[float, float, float]

    @classmethod
    def of(cls, criterion: v8DetectionLoss) -> Rule:
        """What a loss of Ultralytics was set up with."""
        assigner, gains = criterion.assigner, criterion.hyp
        return cls(
            assigner.topk,
            assigner.topk2,
            assigner.alpha,
            assigner.beta,
            assigner.eps,
            assigner.stride_val,
            (gains.box, gains.cls, gains.dfl),
        )


def rules_of(criterion: Any) -> list[tuple[float, Rule]]:
    """The branches' weights and rules, from the loss that Ultralytics makes for a network."""
    if isinstance(criterion, v8DetectionLoss):
        return [(1.0, Rule.of(criterion))]
    one2many, one2one = criterion.one2many, criterion.one2one
    return [(criterion.o2m, Rule.of(one2many)), (criterion.o2o, Rule.of(one2one))]


@dataclass(frozen=True)
class Objects:
    """The labels of a batch: `image` and `category`, int64 `(m,)`, and `boxes`, float32 `(m, 4)`,
    x1 y1 x2 y2 in pixels."""

    image: Tensor
    category: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Points:
    """The anchor points of all levels: `centres`, float32 `(A, 2)`, x y in strides, and `strides`,
    float32 `(A, 1)`, pixels."""

    centres: Tensor
    strides: Tensor


@dataclass(frozen=True)
class Assignment:
    """The `k` anchor points that answer for an object, no point of an image twice.

    Attributes:
        image, point, index: int64 `(k,)`: the place, and which of the objects it answers for.
        target_scores: float32 `(k,)` in [0, 1]: the class score it is to have, its weight
            elsewhere.
    """

    image: Tensor
    point: Tensor
    index: Tensor
    target_scores: Tensor


def objects_of(targets: Tensor, image_shape: tuple[int, int]) -> Objects:
    """Labels `(m, 6)`: image, category, cx, cy, w, h in [0, 1], on images of that height and width;
    less those whose corners lie further above and left of the image's than below and right."""
    height, width = image_shape
    boxes = xywh2xyxy(targets[:, 2:6] * targets.new_tensor([width, height, width, height]))
    inside = boxes.sum(1) > 0
    return Objects(targets[inside, 0].long(), targets[inside, 1].long(), boxes[inside])


class _Rows(torch.autograd.Function):
    """What a branch predicts at places none of which is given twice: `(k, c)` of `(n, c, A)`, in
    float32. Its gradient is that of the places, zero elsewhere, filled in once."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, image: Tensor, point: Tensor) -> Tensor:
        ctx.save_for_backward(values, image, point)
        return values.mT[image, point].float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        values, image, point = ctx.saved_tensors
        whole = torch.zeros_like(values.mT)
        whole[image, point] = grad.to(whole.dtype)
        return whole.mT, None, None


class _CrossEntropy(torch.autograd.Function):
    """Binary cross-entropy of all class logits `(n, c, A)`, summed, where all but a few scores are
    to be zero: the places of an assignment, its objects' categories, and their scores."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        image: Tensor,
        category: Tensor,
        point: Tensor,
        target_scores: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(logits, image, category, point, target_scores)
        positive = logits[image, category, point].float()
        return F.softplus(logits.float()).sum() - (target_scores * positive).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, image, category, point, target_scores = ctx.saved_tensors
        slope = logits.float().sigmoid()
        slope[image, category, point] -= target_scores
        return (slope * grad).to(logits.dtype), None, None, None, None


def _boxes(logits: Tensor, centres: Tensor) -> Tensor:
    """Boxes `(k, 4)`, x1 y1 x2 y2 in strides, of rows `(k, 4 * reg_max)` at points `(k, 2)`: the
    distances are the means over the bins (Li et al., 2020, eq. 3), or plain numbers."""
    bins = logits.unflatten(1, (4, -1))
    if bins.shape[2] == 1:
        left_top, right_bottom = logits.chunk(2, 1)
    else:
        place = torch.arange(bins.shape[2], device=bins.device, dtype=bins.dtype)
        left_top, right_bottom = bins.softmax(2).matmul(place).chunk(2, 1)
    return torch.cat([centres - left_top, centres + right_bottom], dim=1)


def _overlaps(boxes: Tensor, other_boxes: Tensor) -> Tensor:
    """CIoU of boxes `(k, 4)`, pair by pair, `(k,)`."""
    return bbox_iou(boxes, other_boxes, xywh=False, CIoU=True).squeeze(1)


def _best(
    values: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int], count: int
) -> Tensor:
    """Which of the values at (row, column) of a matrix of zeros are among their row's largest."""
    matrix = values.new_zeros(shape)
    matrix[row, column] = values
    largest = matrix.topk(min(count, shape[1]), dim=1).indices
    return torch.zeros_like(matrix, dtype=torch.bool).scatter_(1, largest, True)[row, column]


@torch.no_grad()
def assign(branch: Branch, objects: Objects, points: Points, rule: Rule) -> Assignment:
    """Choose the anchor points that answer for the objects, by what the branch predicts there."""
    index, point = _inside(objects.boxes, points, rule.smallest).nonzero(as_tuple=True)
    image, shape = objects.image[index], (len(objects.boxes), len(points.centres))
    rows = branch.boxes.mT[image, point].float()
    boxes = _boxes(rows, points.centres[point]) * points.strides[point]
    overlap = _overlaps(objects.boxes[index], boxes).clamp_(0)
    score = branch.scores[image, objects.category[index], point].float().sigmoid()
    metric = score.pow(rule.score_power) * overlap.pow(rule.overlap_power)
    positive = _best(metric, index, point, shape, rule.points)

    # A point that several objects chose goes to the one in whose box it lies that it meets best,
    # the first of equals, whether or not that one chose it.
    places = len(branch.boxes) * shape[1]
    place = image * shape[1] + point
    claims = positive.new_zeros(places, dtype=torch.int32).index_add_(0, place, positive.int())
    best = overlap.new_zeros(places).scatter_reduce_(0, place, overlap, "amax")
    order = torch.arange(len(place), device=place.device)
    equals = overlap == best[place]
    first = order.new_full((places,), len(place))
    first.scatter_reduce_(0, place[equals], order[equals], "amin")
    positive = torch.where(claims[place] > 1, first[place] == order, positive)
    if rule.kept != rule.points:
        positive &= _best(metric * positive, index, point, shape, rule.kept)

    image, point, index = image[positive], point[positive], index[positive]
    metric, overlap = metric[positive], overlap[positive]
    # The best of an object's points is to score what it overlaps, the others in proportion.
    top = metric.new_zeros(2, shape[0])
    top[0].scatter_reduce_(0, index, metric, "amax")
    top[1].scatter_reduce_(0, index, overlap, "amax")
    return Assignment(image, point, index, metric * top[1, index] / (top[0, index] + rule.epsilon))


def _inside(boxes: Tensor, points: Points, smallest: float) -> Tensor:
    """Which points lie in which boxes `(m, 4)`, small ones enlarged: bool `(m, A)`."""
    enlarged = xyxy2xywh(boxes)
    enlarged[:, 2:].clamp_(min=smallest)
    corners = xywh2xyxy(enlarged)[:, :, None]
    x, y = (points.centres * points.strides).unbind(1)
    inside = (x - corners[:, 0] > _INSIDE) & (corners[:, 2] - x > _INSIDE)
    return inside & (y - corners[:, 1] > _INSIDE) & (corners[:, 3] - y > _INSIDE)


def branch_loss(branch: Branch, targets: Tensor, strides: Tensor, rule: Rule) -> Tensor:
    """Box (CIoU), class and distance loss `(3,)` of one branch, gains applied.

    Each is divided by the sum of the scores that the assigned points are to have, at least 1.

    Args:
        branch: logits, of any floating type; what is read of them is computed with in float32.
        targets: float32 `(m, 6)`: image, category, cx, cy, w, h in [0, 1]; may be empty.
        strides: of the levels, pixels.
        rule: of the branch.
    """
    points = Points(*make_anchors(branch.grids(), strides, 0.5))
    (rows, columns), stride = branch.shapes[0], int(strides[0])
    height, width = rows * stride, columns * stride
    objects = objects_of(targets, (height, width))
    assignment = assign(branch, objects, points, rule)
    total = assignment.target_scores.sum().clamp_(min=1)

    category = objects.category[assignment.index]
    entropy = _CrossEntropy.apply(
        branch.scores, assignment.image, category, assignment.point, assignment.target_scores
    )
    logits = _Rows.apply(branch.boxes, assignment.image, assignment.point)
    centres, scale = points.centres[assignment.point], points.strides[assignment.point]
    boxes = objects.boxes[assignment.index] / scale
    box = (1 - _overlaps(_boxes(logits, centres), boxes)) * assignment.target_scores
    target_distances = torch.cat([centres - boxes[:, :2], boxes[:, 2:] - centres], dim=1)
    reg_max = logits.shape[1] // 4
    if reg_max > 1:
        distance = _focal(logits.unflatten(1, (4, reg_max)), target_distances)
    else:
        sides = scale / logits.new_tensor([width, height, width, height])
        distance = ((logits - target_distances) * sides).abs()
    distance = distance.mean(1) * assignment.target_scores
    gains = logits.new_tensor(rule.gains)
    return torch.stack([box.sum(), entropy, distance.sum()]) / total * gains


def _focal(logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss (Li et al., 2020, eq. 6) of distances `(k, 4)` in bins, from logits
    `(k, 4, reg_max)`: the cross-entropies of the two bins next to one, by how near they are."""
    reg_max = logits.shape[2]
    distances = distances.clamp(0, reg_max - 1.01)
    left = distances.long()
    entropy = -logits.log_softmax(2)
    right = distances - left
    near = entropy.gather(2, torch.stack([left, left + 1], dim=2))
    return near[..., 0] * (1 - right) + near[..., 1] * right

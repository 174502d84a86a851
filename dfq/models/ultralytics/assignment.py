"""Which anchor points answer for which objects.

Objects get their anchor points by task-aligned assignment (Feng et al., 2021): of the points in an
object's box those at which the class is scored and the box is met best. Ultralytics' own loss looks
for that at every class of every point of every object. Here only the object's class is looked at,
and, where shapes may depend on values, only the points in its box; the result is the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils.loss import v8DetectionLoss

from ..ciou import Ciou, area_and_angle, ciou, sides_of
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
class Points:
    """The anchor points of all levels.

    Attributes:
        strides: float32 `(A, 1)`, pixels.
        origin: float32 `(A, 4)`, pixels: -x, -y, x, y. Added to it, the distances of a box's sides
            are -x1, -y1, x2, y2.
    """

    strides: Tensor
    origin: Tensor

    @classmethod
    def of(cls, centres: Tensor, strides: Tensor) -> Points:
        """From `(A, 2)`, x y in strides, and `(A, 1)`, pixels: what `make_anchors` gives."""
        pixels = centres * strides
        return cls(strides, torch.cat([-pixels, pixels], 1))


@dataclass(frozen=True)
class Objects:
    """The labels of a batch.

    Attributes:
        image, category: int64 `(m,)`.
        sides: `(m, 4)`, pixels: -x1, -y1, x2, y2 of the box.
        reach: `(m, 4)`, the same of the box in which points are looked for; nowhere, where the row
            stands for nothing.
    """

    image: Tensor
    category: Tensor
    sides: Tensor
    reach: Tensor


@dataclass(frozen=True)
class Assignment:
    """Places that may answer for an object, `k` of them.

    Attributes:
        object: int64 `(k,)`: which of the objects.
        image, point: int64 `(k,)`: the place.
        scores: float `(k,)` in [0, 1]: the class score it is to have, its weight elsewhere; 0 where
            it does not answer. No place is there twice with a score above.
        distances: `(k, 4)`, pixels, from the point to the sides of the object's box.
        overlaps: of what is predicted there with it.
    """

    object: Tensor
    image: Tensor
    point: Tensor
    scores: Tensor
    distances: Tensor
    overlaps: Ciou


@functools.lru_cache(maxsize=64)
def _constants(
    width: int, height: int, smallest: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of centres and sides: the image's sides, and the least in pixels, `(4,)` each; and what makes
    -x1, -y1, x2, y2 of them and the sum of x1, y1, x2, y2, `(4, 5)`."""
    size, least = [width, height] * 2, [-torch.inf, -torch.inf, smallest, smallest]
    # Products with these are exact, and so are the corners' last bits those of centre +- side / 2.
    corners = [
        [-1, 0, 1, 0, 2],
        [0, -1, 0, 1, 2],
        [0.5, 0, 0.5, 0, 0],
        [0, 0.5, 0, 0.5, 0],
    ]
    made = [torch.tensor(values, dtype=dtype).to(device) for values in (size, least, corners)]
    return made[0], made[1], made[2]


def objects_of(targets: Tensor, image_shape: tuple[int, int], rule: Rule) -> Objects:
    """The rows of labels, on images of that height and width; those whose corners lie further above
    and left of the image's than below and right stand for nothing, as do those of images below 0.

    Args:
        targets: `(m, 6)`: image, category, cx, cy, w, h in [0, 1]; image `-1 - i` counts as `i`.
    """
    height, width = image_shape
    size, least, corners = _constants(width, height, rule.smallest, targets.dtype, targets.device)
    numbers, boxes = targets[:, :2].long(), targets[:, 2:6] * size
    image, sides = numbers[:, 0], boxes @ corners
    absent = (sides[:, 4] <= 0) | (image < 0)
    # Ultralytics goes by way of the corners: on the very edge of a box the last bit decides.
    starts, ends = sides[:, :2], sides[:, 2:4]
    boxes = torch.cat([(ends - starts) * 0.5, ends + starts], 1)
    reach = torch.maximum(boxes, least) @ corners[:, :4]
    # ~i = -1 - i.
    image = image ^ (image >> 63)
    reach = reach.masked_fill_(absent[:, None], -torch.inf)
    return Objects(image, numbers[:, 1], sides[:, :4], reach)


def wide(values: Tensor) -> Tensor:
    """As float32, or float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def distances_of(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Distances `(..., 4)` in strides of rows `(..., 4 * reg_max)`, and the distributions
    `(..., 4, reg_max)` whose means they are (Li et al., 2020, eq. 3); None where they are plain
    numbers."""
    bins = logits.unflatten(-1, (4, -1))
    if bins.shape[-1] == 1:
        return logits, None
    distributions = bins.softmax(-1)
    return distributions.matmul(bins_of(bins.shape[-1], bins.dtype, bins.device)), distributions


@functools.lru_cache(maxsize=16)
def bins_of(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0, 1, ... count - 1."""
    return torch.arange(count, dtype=dtype).to(device)


@functools.lru_cache(maxsize=64)
def _numbers(count: int, device: torch.device) -> Tensor:
    """`(2, count)`: 0, 1, ... and the same negative."""
    numbers = torch.arange(count)
    return torch.stack([numbers, -numbers]).to(device)


@functools.lru_cache(maxsize=64)
def _repeated(count: int, times: int, device: torch.device) -> Tensor:
    """0, 1, ... count - 1, so many times each."""
    return torch.arange(count).repeat_interleave(times).to(device)


def assign(
    branch: Branch, objects: Objects, points: Points, rule: Rule, shards: int, listed: bool
) -> Assignment:
    """Choose the anchor points that answer for the objects, by what the branch predicts there.

    Args:
        branch: logits, of images of several batches one after the other.
        objects: as many rows for each batch, those of a batch after those of the one before.
        points, rule: of the branch.
        shards: how many batches.
        listed: whether shapes may depend on values: pairs of an object and a point in its box are
            then listed. Else there is a place for every pair.
    """
    image = objects.image
    count, shape = len(points.strides), (len(image), len(points.strides))
    inside = (objects.reach[:, None] - points.origin).amin(-1) > _INSIDE
    area, angle = area_and_angle(sides_of(objects.sides))
    rows = branch.boxes.mT
    if listed:
        index, point = inside.nonzero(as_tuple=True)
        predicted, _ = distances_of(wide(rows[image[index], point]))
        predicted = predicted * points.strides[point]
        distances = objects.sides[index] - points.origin[point]
        area, angle = area[index], angle[index]
        score = branch.scores[image[index], objects.category[index], point]
    else:
        predicted, _ = distances_of(wide(rows))
        predicted = (predicted * points.strides)[image]
        distances = objects.sides[:, None] - points.origin
        area, angle = area[:, None], angle[:, None]
        score = branch.scores[image, objects.category]
    overlaps = ciou(predicted, distances, sides_of(predicted), area, angle)
    overlap = overlaps.value.clamp(min=0)
    metric = wide(score).sigmoid().pow_(rule.score_power) * overlap.pow(rule.overlap_power)
    ranks = torch.stack([metric, overlap])
    if listed:
        pairs = ranks
        ranks = pairs.new_zeros(2, *shape)
        ranks[:, index, point] = pairs
    else:
        ranks *= inside
    owner, point, real = _owners(ranks, inside, image, len(rows), rule, shards, listed)

    number = owner * count + point
    both = ranks.view(2, -1).index_select(1, number) * real
    if rule.kept != rule.points:
        held = both.new_zeros(shape)
        held.view(-1).index_add_(0, number, both[0])
        best = held.topk(min(rule.kept, count), 1).indices
        both = both * torch.zeros_like(held).scatter_(1, best, 1.0).view(-1)[number]
    # The best of an object's points is to score what it overlaps, the others in proportion.
    top = both.new_zeros(2, shape[0]).scatter_reduce_(1, owner.expand(2, -1), both, "amax")
    top = top.index_select(1, owner)
    scores = both[0] * top[1] / (top[0] + rule.epsilon)
    if listed:
        # Of the pairs in their order. What is none has met nothing, and counts for nothing.
        number = inside.view(-1).cumsum(0)[number].sub_(1).clamp_(min=0)
    distances = distances.view(-1, 4).index_select(0, number)
    return Assignment(owner, image[owner], point, scores, distances, overlaps.rows(number))


def _owners(
    ranks: Tensor, inside: Tensor, image: Tensor, images: int, rule: Rule, shards: int, listed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Points that objects claim: which objects get them and which they are, int64 `(k,)` each, and
    whether they count, bool `(k,)`: each point of an image does so once at most.

    Args:
        ranks: metric and overlap of each pair, zero where the point is not inside: `(2, m, A)`.
        inside: bool `(m, A)`.
        image: int64 `(m,)`, of how many images.
    """
    count = inside.shape[1]
    points = ranks[0].topk(min(rule.points, count), 1).indices
    claims = inside.gather(1, points)
    if listed:
        claimer, rank = claims.nonzero(as_tuple=True)
        points = points[claimer, rank]
        numbers = bids = _numbers(len(claimer), image.device)
    else:
        claimer = _repeated(*points.shape, image.device)
        points, numbers = points.flatten(), _numbers(points.numel(), image.device)
        bids = torch.where(claims.flatten(), numbers, torch.iinfo(torch.int64).max // 2)
    places = image[claimer] * count + points
    # Of the claims to a place the first, and less the last one.
    ends = bids.new_full((2, images * count), torch.iinfo(torch.int64).max // 2)
    ends.scatter_reduce_(1, places.expand(2, -1), bids, "amin")
    ends = ends.index_select(1, places)
    real, contested = ends[0] == numbers[0], ends.sum(0) != 0

    # A point that several objects claim goes to the one in whose box it lies that it meets best,
    # the first of equals, whether or not that one claimed it.
    if listed:
        column = contested.nonzero()[:, 0]
        if len(column) == 0:
            return claimer, points, real
        rivals = ranks[1].index_select(1, points[column])
        rivals.masked_fill_(image[:, None] != image[claimer[column]], -1.0)
        return claimer.index_copy(0, column, rivals.argmax(0)), points, real
    of_shard = image.view(shards, -1)
    rivals = ranks[1].view(shards, -1, count)
    where = points.view(shards, 1, -1).expand(-1, rivals.shape[1], -1)
    elsewhere = of_shard[:, :, None] != image[claimer].view(shards, 1, -1)
    winner = rivals.gather(2, where).masked_fill_(elsewhere, -1.0).argmax(1)
    if shards > 1:
        winner += rivals.shape[1] * _numbers(shards, image.device)[0, :, None]
    return torch.where(contested, winner.flatten(), claimer), points, real

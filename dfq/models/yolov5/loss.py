"""The training loss of the original YOLOv5 (v6 and v7 defaults), as a function of its logits.

All levels are computed at once, and the gradient is written out: by autograd, level by level, it
would take hundreds of operations on a few values, which a GPU, and a small network on a CPU, takes
longer to start than to do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ciou import area_and_angle, ciou, sides_of

BOX_GAIN = 0.05
OBJECTNESS_GAIN = 1.0
CLASS_GAIN = 0.5
ANCHOR_RATIO = 4.0
_NEIGHBOUR = 0.5
_SMALLEST_SIDE = 1e-4


def boxes_of(logits: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Box logits `(..., 4)` to centres `2σ - 0.5` relative to the cell's corner and sizes
    `(2σ)² · anchor`, each `(..., 2)` in the unit of `anchors` (broadcastable to `(..., 2)`)."""
    doubled = logits.sigmoid() * 2
    sides = doubled[..., 2:4]
    # Not a power: LiteRT has none of five dimensions.
    return doubled[..., :2] - 0.5, sides * sides * anchors


def balance_of(levels: int) -> list[float]:
    """Weights of the levels' objectness, finest first."""
    return [4.0, 1.0, 0.4] if levels == 3 else [4.0, 1.0, 0.25, 0.06, 0.02][:levels]


@dataclass(frozen=True)
class _Layout:
    """What follows from the shapes of the levels alone; L levels, a anchors.

    Attributes:
        columns: int64 `(5,)`: of labels, those that the next two scale.
        offset, scale: `(L, 1, 5)`: make of them what tells which cells answer for an object: a
            constant, then the distances of its centre from the left, top, right and bottom.
        shifts: `(5, 2)`: from the centre into these cells.
        first, last: int64 `(L, 1, 1, 2)`: column and row of the first and the last cell.
        steps: int64 `(L, 1, 1, 2)`: from a column, and a row, to the next one.
        per_image: int64 `(L, 1, 1)`: predictions of an image.
        anchor: int64 `(L, 1, a, 1)`: predictions of the anchors before.
        before: int64 `(L, 1, 1, 1)`: predictions of the levels before.
        weights: `(predictions of all,)`: of their objectness in the loss of their batch.
        signs: `(2, 1)`: of the centre, in the distances of left and right sides.
        classes: int64, their numbers.
        sides: `(L, 1, 2)`: width and height of a level in cells.
        counts: predictions of each level.
    """

    columns: Tensor
    offset: Tensor
    scale: Tensor
    shifts: Tensor
    first: Tensor
    last: Tensor
    steps: Tensor
    per_image: Tensor
    anchor: Tensor
    before: Tensor
    weights: Tensor
    signs: Tensor
    classes: Tensor
    sides: Tensor
    counts: list[int]


@functools.lru_cache(maxsize=16)
def _layout(
    shapes: tuple[torch.Size, ...], shards: int, dtype: torch.dtype, device: torch.device
) -> _Layout:
    def real(values: Any) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    def whole(values: Any) -> Tensor:
        return torch.tensor(values).to(device)

    sides = [(width, height) for _, _, height, width, _ in shapes]
    images, anchors, outputs = shapes[0][0], shapes[0][1], shapes[0][4]
    cells = [anchors * width * height for width, height in sides]
    counts = [images * count for count in cells]
    weights = [
        torch.full((count,), weight * shards / count, dtype=dtype)
        for count, weight in zip(counts, balance_of(len(shapes)), strict=True)
    ]
    return _Layout(
        columns=whole([2, 2, 3, 2, 3]),
        # The cell of the centre always does: as one that is near enough and not the first.
        offset=real([[[1.25, 0, 0, width, height]] for width, height in sides]),
        scale=real([[[0, width, height, -width, -height]] for width, height in sides]),
        shifts=_NEIGHBOUR * real([[0, 0], [-1, 0], [0, -1], [1, 0], [0, 1]]),
        first=whole([[[[0, 0]]] for _ in sides]),
        last=whole([[[[width - 1, height - 1]]] for width, height in sides]),
        steps=whole([[[[1, width]]] for width, _ in sides]),
        per_image=whole(cells)[:, None, None],
        anchor=whole(
            [[[[index * width * height] for index in range(anchors)]] for width, height in sides]
        ),
        before=whole([sum(counts[:level]) for level in range(len(shapes))])[:, None, None, None],
        weights=torch.cat(weights).to(device),
        signs=real([[-1.0], [1.0]]),
        classes=whole(range(outputs - 5)),
        sides=real([[side] for side in sides]),
        counts=counts,
    )


@functools.lru_cache(maxsize=64)
def _gains(
    levels: int, classes: int, area: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Of box, objectness and class loss, `(3,)`, from sums of means over each level."""
    # The original does not train the class where there is one.
    of_class = CLASS_GAIN / 80 if classes > 1 else 0.0
    gains = torch.tensor([BOX_GAIN, OBJECTNESS_GAIN * area / 640**2, of_class], dtype=dtype)
    return (gains * (3 / levels)).to(device)


@dataclass(frozen=True)
class Answers:
    """Predictions that may answer for an object: all at the places where one could, or those that
    do, listed.

    Attributes:
        place: int64 `(k,)`: the number of the prediction, among those of all levels; of each level
            image by image, row by row, column by column, anchor by anchor.
        by_level: int64 `(k_l,)` each: the same, among those of the level.
        used: whether they do, as 0 and 1, broadcastable to `shape`; None: they do.
        share: `(levels, shards, k / levels / shards)`, or `(1, 1, k)`: the weight of each in means
            over its level.
        shape: of the next ones but for the last dimension, broadcastable to it: `k` in all.
        distances: `(..., 4)`: from the cell's corner to the sides of the object, see `ciou`.
        wanted: `(..., classes)`: 1 at the object's category.
        anchors: `(..., 2)`.
    """

    place: Tensor
    by_level: list[Tensor]
    used: Tensor | None
    share: Tensor
    shape: tuple[int, ...]
    distances: Tensor
    wanted: Tensor
    anchors: Tensor


def assign(targets: Tensor, anchors: Tensor, layout: _Layout, shards: int, listed: bool) -> Answers:
    """Choose the predictions that answer for the targets.

    An anchor answers when neither side is more than `ANCHOR_RATIO` times the object's or the
    reverse. It does so in the cell of the object's centre and in up to two neighbours: those that
    touch the half of the cell the centre lies in, and that exist.

    Args:
        targets: as for `losses`.
        anchors: `(levels, a, 2)` in cells.
        layout: of the levels.
        shards: how many batches.
        listed: whether shapes may depend on values.
    """
    numbers = targets[:, :2].long()
    image, category = numbers.unbind(1)
    # Levels, objects, anchors, directions: (L, m, a, 5).
    near = torch.addcmul(layout.offset, targets.index_select(1, layout.columns), layout.scale)
    extent = targets[:, 4:6] * layout.sides
    ratio = extent[:, :, None] / anchors[:, None]
    fits = torch.maximum(ratio, ratio.reciprocal()).amax(-1) < ANCHOR_RATIO
    fits &= (image >= 0)[:, None]
    reaches = (near % 1 < _NEIGHBOUR).logical_and_(near > 1)
    answers = fits[..., None] & reaches[:, :, None]

    centres = near[..., None, 1:3]
    cell = (centres + layout.shifts).long().clamp_(layout.first, layout.last)
    # ~i = -1 - i.
    place = (cell * layout.steps).sum(-1) + (image ^ (image >> 63))[:, None] * layout.per_image
    place = place[:, :, None] + layout.anchor
    half = extent[:, :, None, None] / 2
    distances = torch.addcmul(half, (centres - cell)[..., None, :], layout.signs).flatten(3)
    wanted = (category[:, None] == layout.classes).to(targets.dtype)
    levels, shape = len(anchors), tuple(answers.shape)
    if listed:
        level, index, anchor, direction = answers.nonzero(as_tuple=True)
        counts = answers.flatten(1).sum(1)
        place = place[answers]
        return Answers(
            place=place + layout.before.view(-1)[level],
            by_level=list(place.split(counts.tolist())),
            used=None,
            share=counts.to(targets.dtype).reciprocal_()[level].view(1, 1, -1),
            shape=(len(level),),
            distances=distances[level, index, direction],
            wanted=wanted[index],
            anchors=anchors[level, anchor],
        )
    used = answers.to(targets.dtype)
    share = used.view(levels, shards, -1)
    return Answers(
        place=(place + layout.before).flatten(),
        by_level=list(place.flatten(1).unbind()),
        used=used,
        share=share / share.sum(2, keepdim=True).clamp_(min=1),
        shape=shape,
        distances=distances[:, :, None],
        wanted=wanted[:, None, None],
        anchors=anchors[:, None, :, None],
    )


class _Loss(torch.autograd.Function):
    """See `losses`."""

    @staticmethod
    def forward(
        ctx: Any, targets: Tensor, anchors: Tensor, area: int, shards: int, listed: bool,
        *raw: Tensor,
    ) -> Tensor:  # fmt: skip
        dtype = torch.float64 if raw[0].dtype == torch.float64 else torch.float32
        layout = _layout(tuple(level.shape for level in raw), shards, dtype, targets.device)
        answers = assign(targets.to(dtype), anchors.to(dtype), layout, shards, listed)
        levels = [level.flatten(0, 3) for level in raw]
        parts = [
            level.index_select(0, place)
            for level, place in zip(levels, answers.by_level, strict=True)
        ]
        picked = torch.cat(parts).to(dtype).view(*answers.shape, raw[0].shape[-1])
        objectness = torch.cat([level[:, 4] for level in levels]).to(dtype)

        likely = picked[..., :4].sigmoid()
        doubled = likely * 2
        size = doubled[..., 2:].square() * answers.anchors
        # CIoU divides by the height, and a sigmoid may underflow to zero.
        sides = size.clamp(min=_SMALLEST_SIDE)
        centre = doubled[..., :2] - 0.5
        distances = torch.addcmul((sides / 2)[..., None, :], centre[..., None, :], layout.signs)
        overlaps = ciou(
            distances.flatten(-2), answers.distances, sides,
            *area_and_angle(sides_of(answers.distances)),
        )  # fmt: skip
        # Where several objects claim one prediction it is to be as sure as the best overlap says.
        overlap = overlaps.value.clamp(min=0)
        if answers.used is not None:
            overlap *= answers.used
        goal = torch.zeros_like(objectness)
        goal.scatter_reduce_(0, answers.place, overlap.view(-1), "amax")
        unsure = torch.addcmul(F.softplus(objectness), objectness, goal, value=-1)
        scores = picked[..., 5:]
        classes = torch.addcmul(F.softplus(scores), scores, answers.wanted, value=-1).sum(-1)
        sums = torch.stack([1 - overlaps.value, classes], -1).view(*answers.share.shape, 2)
        sums = (answers.share[:, :, None] @ sums).sum(0)[:, 0]
        terms = torch.stack([sums[:, 0], _by_shard(unsure, layout, shards), sums[:, 1]], 1)
        gains = _gains(len(raw), scores.shape[-1], area, dtype, targets.device)

        ctx.save_for_backward(likely, doubled, size, scores, objectness, goal, gains, *raw)
        ctx.overlaps, ctx.answers, ctx.layout = overlaps, answers, layout
        return terms.mul_(gains)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        likely, doubled, size, scores, objectness, goal, gains, *raw = ctx.saved_tensors
        answers, layout = ctx.answers, ctx.layout
        factors = grad * gains
        weights = answers.share[..., None] * factors[:, None]
        weights = weights.view(*answers.shape, 3)
        rows = likely.new_zeros(*answers.shape, 5 + scores.shape[-1])
        pull = ctx.overlaps.gradient().mul_(-weights[..., :1])
        low, high = pull[..., :2], pull[..., 2:]
        # From sides to centres and sizes, and to what sigmoids make them of.
        moved = torch.cat([high - low, high + low], -1)
        kept = F.threshold(size, _SMALLEST_SIDE, 0.0)
        slope = torch.cat([doubled[..., :2], kept], -1).mul_(1 - likely)
        torch.mul(moved, slope, out=rows[..., :4])
        surplus = scores.sigmoid().sub_(answers.wanted)
        torch.mul(surplus, weights[..., 2:], out=rows[..., 5:])

        # One for all levels, filled in once.
        whole = raw[0].new_zeros(len(objectness), rows.shape[-1])
        whole.index_add_(0, answers.place, rows.view(-1, rows.shape[-1]).to(whole.dtype))
        unsure = objectness.sigmoid().sub_(goal).mul_(layout.weights)
        _scale_by_shard(unsure, factors[:, 1], layout)
        whole[:, 4] = unsure
        parts = zip(whole.split(layout.counts), raw, strict=True)
        levels = [part.view(level.shape) for part, level in parts]
        return None, None, None, None, None, *levels


def _by_shard(values: Tensor, layout: _Layout, shards: int) -> Tensor:
    """Weighted sums of a value for each prediction, `(shards,)`."""
    if shards == 1:
        return torch.dot(values, layout.weights)[None]
    levels = (values * layout.weights).split(layout.counts)
    return torch.stack([level.view(shards, -1).sum(1) for level in levels]).sum(0)


def _scale_by_shard(values: Tensor, factors: Tensor, layout: _Layout) -> None:
    """Multiply a value for each prediction by the factor of its shard, `(shards,)`, in place."""
    if len(factors) == 1:
        values *= factors
        return
    for level in values.split(layout.counts):
        level.view(len(factors), -1).mul_(factors[:, None])


def losses(
    raw: list[Tensor],
    targets: Tensor,
    anchors: Tensor,
    image_shape: tuple[int, int],
    *,
    shards: int = 1,
    listed: bool = True,
) -> Tensor:
    """Box (CIoU), objectness and class loss of each of several batches of one size, `(shards, 3)`,
    float32 or float64, gains applied, means over a batch.

    Where several objects claim one prediction its objectness target is the largest of their CIoUs
    (the original's `sort_obj_iou`), so that the loss does not depend on the order of writes. The
    class loss is zero where there is one category, which the original does not train.

    Args:
        raw: logits `(shards * n, anchors, h, w, 5 + classes)` a level, one batch after the other.
        targets: `(m, 6)`: image (of all), category, cx, cy, w, h in [0, 1]; may be empty. Of
            several batches as many rows each, those of a batch after those of the one before; where
            the image is negative, a row stands for nothing, and is looked for in image
            `-1 - image`.
        anchors: `(levels, anchors, 2)` in cells.
        image_shape: height and width in pixels.
        shards: how many batches.
        listed: whether shapes may depend on values, which takes less memory; of one batch alone.
            Else every object has all the places that could answer for it, and those that do not
            count for nothing: a GPU runs through without waiting, and a recording of it stays valid
            for other objects.
    """
    area = image_shape[0] * image_shape[1]
    terms: Tensor = _Loss.apply(targets, anchors, area, shards, listed, *raw)
    return terms


def yolov5_loss(
    raw: list[Tensor], targets: Tensor, anchors: Tensor, image_shape: tuple[int, int]
) -> dict[str, Tensor]:
    """The terms of `losses` of one batch: scalars "box", "objectness" and "class"."""
    box, objectness, category = losses(raw, targets, anchors, image_shape)[0].unbind()
    return {"box": box, "objectness": objectness, "class": category}

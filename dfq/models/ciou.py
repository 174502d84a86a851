"""Complete IoU of boxes with its gradient written out, for losses of few operations.

    CIoU = IoU - rho^2 / c^2 - alpha v,  v = 4 / pi^2 (atan(w / h) - atan(w_t / h_t))^2,
    alpha = v / (1 - IoU + v)

(Zheng et al., 2020), rho the distance of the centres, c the diagonal of the smallest box around
both; alpha counts as a constant. By autograd the way back takes as many small operations as the
way forward, and what starts them on a GPU takes longer than they do.

A box is how far its sides lie left, above, right and below of a point that it shares with its
target: sums of distances are all there is to it, and they are what anchor-free heads predict.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-7
"""Added to heights, unions, diagonals and 1 - IoU, as YOLO's `bbox_iou` does."""

_SHAPE = 4 / math.pi**2


@functools.lru_cache(maxsize=16)
def _constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of left and right, and of width and height, `(2,)` each."""
    signs = torch.tensor([1.0, -1.0], dtype=dtype).to(device)
    return signs, 4 * _SHAPE**2 * signs


def sides_of(distances: Tensor) -> Tensor:
    """Width and height `(..., 2)` of boxes `(..., 4)`, with what keeps heights from zero."""
    sides = distances[..., :2] + distances[..., 2:]
    sides[..., 1].add_(EPSILON)
    return sides


def area_and_angle(sides: Tensor) -> tuple[Tensor, Tensor]:
    """Of targets with sides `(..., 2)`: what `ciou` takes, `(...,)` each."""
    width, height = sides.unbind(-1)
    return width * height + EPSILON, (width / height).atan_()


@dataclass(frozen=True)
class Ciou:
    """The CIoU of boxes with their targets, `(...,)`, and what its gradient takes.

    Attributes:
        value: CIoU.
        nearer: bool `(..., 4)`: which sides end before the target's do.
        sides, inner: width and height `(..., 2)` of the boxes, and of what they share with their
            targets.
        spans: `(..., 4)`: width and height of the smallest box around both, twice the distances of
            the centres.
        squares: `(..., 2)`: sums of squares of the spans.
        union, iou, turned, damping: `(...,)`: turned is by how much the angles of the diagonals
            differ, damping v / alpha.
    """

    value: Tensor
    nearer: Tensor
    sides: Tensor
    inner: Tensor
    spans: Tensor
    squares: Tensor
    union: Tensor
    iou: Tensor
    turned: Tensor
    damping: Tensor

    def rows(self, index: Tensor) -> Ciou:
        """Those at some places, int64 `(k,)`, of all of them one after the other."""

        def pick(values: Tensor, dims: int) -> Tensor:
            return values.flatten(0, values.ndim - 1 - dims).index_select(0, index)

        # Their dimensions more than the value's.
        wide = ("nearer", "sides", "inner", "spans", "squares")
        return Ciou(**{name: pick(part, name in wide) for name, part in vars(self).items()})

    def gradient(self) -> Tensor:
        """Of the value, with respect to the distances `(..., 4)`."""
        slopes = self.spans / self.squares[..., :1]
        # Where the box ends before its target it limits what they share, else what is around.
        share = (self.iou + (self.iou > 0)).div_(self.union).mul_(2)
        inside = self.inner.flip(-1).mul_(share[..., None])
        outside = slopes[..., :2] * (self.squares[..., 1:] / self.squares[..., :1])
        halves = self.nearer.unflatten(-1, (2, 2))
        gradient = torch.where(halves, inside[..., None, :], outside[..., None, :])
        # By way of the area and the angle, and of the distance of the centres.
        angle = self.turned.pow(3).div_(self.damping).div_(self.sides.square().sum(-1))
        signs, turns = _constants(angle.dtype, angle.device)
        size = angle[..., None] * turns
        size = size.add_(self.iou.div(self.union)[..., None], alpha=2).mul_(self.sides.flip(-1))
        gradient.addcmul_(slopes[..., None, 2:], signs[:, None]).sub_(size[..., None, :])
        return gradient.flatten(-2).mul_(0.5)


def ciou(distances: Tensor, targets: Tensor, sides: Tensor, area: Tensor, angle: Tensor) -> Ciou:
    """CIoU, pair by pair; tensors may be broadcast.

    Args:
        distances: `(..., 4)` of the boxes: left, top, right, bottom.
        targets: the same of their targets.
        sides: width and height of the boxes, heights away from zero: see `sides_of`.
        area, angle: of the targets, see `area_and_angle`.
    """
    least, most = torch.minimum(distances, targets), torch.maximum(distances, targets)
    inner = (least[..., :2] + least[..., 2:]).clamp_(min=0)
    width, height = sides.unbind(-1)
    shared = inner[..., 0] * inner[..., 1]
    union = (width * height).add(area).sub_(shared)
    iou = shared / union
    apart = distances - targets
    spans = torch.cat([most[..., :2] + most[..., 2:], apart[..., 2:] - apart[..., :2]], -1)
    squares = spans.square().unflatten(-1, (2, 2)).sum(-1)
    squares[..., 0].add_(EPSILON)
    turned = (width / height).atan_() - angle
    shape = turned.square()
    damping = (1 + EPSILON - iou).add_(shape, alpha=_SHAPE)
    value = torch.addcdiv(iou, squares[..., 1], squares[..., 0], value=-0.25)
    value.addcdiv_(shape.square_(), damping, value=-(_SHAPE**2))
    return Ciou(
        value, distances < targets, sides, inner, spans, squares, union, iou, turned, damping
    )

"""Initial step sizes and zero points: min-max, the rules of LSQ and LSQ+, least squares, cosine.

Every search takes values `(channels, n)` and returns `(scale, zero_point)`, `(channels,)` each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantizers import Quantizer, grid

Range = tuple[Tensor, Tensor]
RangeSearch = Callable[..., Range]


def grid_between(low: Tensor, high: Tensor, bits: int, asymmetric: bool) -> Range:
    """Step size and zero point of the grid that spans [low, high] and zero.

    Args:
        low, high: float `(channels,)`.
        bits: bit width.
        asymmetric: an unsigned grid with a zero point; otherwise a signed one around zero.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    qmin, qmax = grid(bits, signed=not asymmetric)
    if asymmetric:
        scale = (high - low) / (qmax - qmin)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, torch.clamp(torch.round(-low / scale), qmin, qmax)
    scale = torch.maximum(high / qmax, low / qmin)
    return torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros_like(scale)


def grid_above(quantizer: Quantizer, low: Tensor, find: Callable[[bool], Range]) -> Range:
    """The grid that a search finds for a quantizer of activations.

    Args:
        quantizer: per tensor.
        low: scalar, the least value that the grid must represent.
        find: step size and zero point, `(1,)` each, for an asymmetric grid or for another; the
            former has its zero point at 0 where no value is negative.
    """
    if quantizer.asymmetric or not quantizer.unsigned or bool(low < 0):
        return find(quantizer.asymmetric)
    scale, _ = find(True)
    return scale, torch.full_like(scale, quantizer.bounds[0])


def minmax(values: Tensor, bits: int, *, asymmetric: bool) -> Range:
    """The grid that spans all values `(channels, n)`: no clipping error, the largest step."""
    low, high = values.aminmax(dim=1)
    return grid_between(low, high, bits, asymmetric)


KEPT_SHARE = 0.9999
"""Of the values, that `percentile` spans."""


def percentile(values: Tensor, bits: int, *, asymmetric: bool) -> Range:
    """The grid that spans the middle `KEPT_SHARE` of the values `(channels, n)`."""
    ordered = values.sort(dim=1).values
    last = values.shape[1] - 1
    cut = round((1 - KEPT_SHARE) / 2 * last)
    return grid_between(ordered[:, cut], ordered[:, last - cut], bits, asymmetric)


def lsq(values: Tensor, bits: int, *, asymmetric: bool) -> Range:
    """For values `(channels, n)`: the initial step of LSQ (Esser et al., ICLR 2020); for an
    asymmetric grid, that of LSQ+ for activations."""
    if asymmetric:
        return least_squares(values, bits)
    return lsq_step(values, grid(bits, signed=True)[1])


def lsq_step(values: Tensor, qmax: int) -> Range:
    """LSQ's initial step, 2 * mean|v| / sqrt(Q_p), of values `(channels, n)`; zero points are 0."""
    scale = 2 * values.abs().mean(dim=1) / math.sqrt(qmax)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.zeros_like(scale)


def three_deviations(values: Tensor, bits: int, *, asymmetric: bool) -> Range:
    """LSQ+'s initial step of weights `(channels, n)` (Bhalgat et al., 2020, section 3.2): the
    greater of |mu - 3 sigma| and |mu + 3 sigma|, over 2^(b - 1). For an asymmetric grid, which its
    weights do not have, that of activations."""
    if asymmetric:
        return least_squares(values, bits)
    deviation, mean = torch.std_mean(values, dim=1, correction=0)
    # The greater of the two is the sum of the magnitudes.
    scale = (mean.abs() + 3 * deviation) / 2 ** (bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.zeros_like(scale)


ROUNDS = 20
"""Of fitting a step size to the integers and rounding to the integers anew, at most."""


def least_squares(values: Tensor, bits: int) -> Range:
    """LSQ+'s initial step and offset of activations `(channels, n)`: those of the least
    ||x_hat - x||^2.

    Both bounds are searched from min-max inwards; then steps are fitted to the integers and zero
    points moved to their neighbours, as long as the error falls. The paper's offset is any real
    number; here it is a whole number of steps."""
    qmin, qmax = grid(bits, signed=False)
    scale, zero = mse(values, bits, asymmetric=True)
    best = _fit(values, scale, zero, qmin, qmax)[1]
    for _ in range(ROUNDS):
        before = best
        for shift in (0, -1, 1):
            moved = (zero + shift).clamp(qmin, qmax)
            fitted, _ = _fit(values, scale, moved, qmin, qmax)
            error = _fit(values, fitted, moved, qmin, qmax)[1]
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, fitted, scale), torch.where(better, moved, zero)
        if torch.equal(best, before):
            break
    return scale, zero


def _fit(
    values: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """For values `(channels, n)`: the step size that suits the integers of a grid best, and the
    mean squared error of that grid itself, `(channels,)` each."""
    column = scale[:, None]
    levels = torch.round(values / column)
    levels = torch.minimum(torch.maximum(levels, (qmin - zero)[:, None]), (qmax - zero)[:, None])
    error = (levels * column - values).square().mean(dim=1)
    square = levels.square().sum(dim=1)
    best = (levels * values).sum(dim=1) / square
    return torch.where((square > 0) & (best > 0), best, scale), error


Distance = Callable[[Tensor, Tensor], Tensor]
"""Of what was got from what was wanted: `(channels, n)` twice -> `(channels,)`."""


def mean_square(got: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each row."""
    return (got - wanted).square_().mean(dim=1)


def cosine_distance(got: Tensor, wanted: Tensor) -> Tensor:
    """1 - cos of the angle between each two rows, from 0 to 2; 1 where a row is all zero."""
    # Of unit vectors it is half the squared distance: 1 less a cosine near 1 would cancel.
    pair = [F.normalize(rows, dim=1, eps=torch.finfo(rows.dtype).tiny) for rows in (got, wanted)]
    distance = (pair[0] - pair[1]).square_().sum(dim=1) / 2
    zero = (got == 0).all(dim=1) | (wanted == 0).all(dim=1)
    return torch.where(zero, torch.ones_like(distance), distance)


LOW_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
"""Of the lower bound, that are tried on an asymmetric grid. One that is a small part of the range
(SiLU's -0.278) needs few candidates."""


def bounds_tried(
    low: Tensor, high: Tensor, steps: int, asymmetric: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Lower and upper bounds from the full range inwards: the upper one in `steps` even steps, the
    lower one with it, or on an asymmetric grid apart from it.

    BRECQ's code takes 80 steps of 1 % down to 21 %, both ends together; QDrop's and PD-Quant's 100
    steps of 1 %, with every zero point; all three with errors to the power 2.4.
    """
    for low_share in LOW_SHARES if asymmetric else (1.0,):
        for step in range(steps):
            share = 1.0 - step / steps
            yield low * (low_share if asymmetric else share), high * share


def _nearest(
    values: Tensor,
    bits: int,
    distance: Distance,
    *,
    asymmetric: bool,
    steps: int,
    through: Callable[[Tensor], Tensor] | None = None,
) -> Range:
    """Of the grids between `bounds_tried`, the one whose values are nearest, per channel."""
    wanted = values if through is None else through(values)
    low, high = values.aminmax(dim=1)
    low, high = low.clamp_max(0), high.clamp_min(0)
    qmin, qmax = grid(bits, signed=not asymmetric)
    best_error = torch.full_like(low, float("inf"))
    best_scale, best_zero = grid_between(low, high, bits, asymmetric)
    for bottom, top in bounds_tried(low, high, steps, asymmetric):
        scale, zero = grid_between(bottom, top, bits, asymmetric)
        column = scale[:, None]
        rounded = torch.round(values / column)
        rounded = torch.maximum(rounded, (qmin - zero)[:, None])
        rounded = torch.minimum(rounded, (qmax - zero)[:, None])
        got = rounded * column
        error = distance(got if through is None else through(got), wanted)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def mse(
    values: Tensor,
    bits: int,
    *,
    asymmetric: bool,
    steps: int = 80,
    through: Callable[[Tensor], Tensor] | None = None,
) -> Range:
    """The grid with the least mean squared rounding and clipping error on `values`, of those
    between `bounds_tried`. Where only an activation function, `through`, reads the values
    `(channels, n)`, errors are measured after it: values far below zero in front of a SiLU then
    hardly count.
    """
    return _nearest(values, bits, mean_square, asymmetric=asymmetric, steps=steps, through=through)


def cosine(values: Tensor, bits: int, *, asymmetric: bool, steps: int = 80) -> Range:
    """The grid, of the same, on which `values` keep their direction best."""
    return _nearest(values, bits, cosine_distance, asymmetric=asymmetric, steps=steps)


CONSUMERS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "leaky_relu": functools.partial(F.leaky_relu, negative_slope=0.1),
    "sigmoid": torch.sigmoid,
}
"""Functions that `mse` can look through, by their names."""

FINE = 8
"""Bits from which on rounding errors are small, and clipping dominates the error."""

VANISHING = frozenset({"silu", "gelu"})
"""Those of them that fall towards zero below it, and are nowhere flat."""

VANISHES = -7.0
"""Below it, these are within 0.007 of zero."""

LEAST_CONSUMED = {"relu": 0.0, **dict.fromkeys(VANISHING, VANISHES)}
"""Values below it have the same result as it, in such a consumer."""

PREDICTION = "prediction"
"""Reader of what is a prediction. Its few large values are the objects: nothing is clipped."""

SEARCHES: dict[str, RangeSearch] = {
    "minmax": minmax,
    "percentile": percentile,
    "lsq": lsq,
    "mse": mse,
    "cosine": cosine,
}

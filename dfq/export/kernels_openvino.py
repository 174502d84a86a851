"""What OpenVINO's CPU plugin computes between grids: integer sums, and behind them float32, step by
step as its kernels (oneDNN's) take them.

A convolution is an exact sum of integers, times a float32 factor, plus a float32 bias; then comes
the activation function in float32, by a polynomial of oneDNN's own, and one fused multiplication
and addition puts the result on the next grid. Without a bias, the factor is a part of that
multiplication. All of that is deterministic, and done here once more, as found on a processor with
AVX-512 and AMX; oneDNN has other kernels for others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .on_grid import Grid, OnGrid, clamped, fused, single

_LOG2_E, _LN2 = 1.44269502, 0.693147182
_LEAST = -87.3365479
"""Below it oneDNN's exponential is zero: the logarithm of the smallest normal float32."""
_POLYNOMIAL = (0.00828929059, 0.0418978221, 0.166676521, 0.499991506, 0.999999701, 1.0)
"""oneDNN's coefficients of the exponential within half an octave of 1, highest power first."""
_NO_SHIFT = 1e-5
"""Of what a quantize adds, the share of the grid below which oneDNN leaves the addition out."""


@dataclass(frozen=True)
class Unquantized:
    """What a layer gives before it is put on a grid.

    Attributes:
        values: float32, of any shape.
        factor: that they are yet to be multiplied with, which the quantize does; None: 1.
    """

    values: Tensor
    factor: Tensor | None = None

    def ends(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """What `values` are at the ends of a grid."""
        low, high = _ends(grid)
        return (low, high) if self.factor is None else (low / self.factor, high / self.factor)


class OpenVinoKernels:
    """The steps, a method an operation."""

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        """Integers of float32 values of any shape, to the nearest even one."""
        return _by_itself(x, *_ends(grid), grid, _is_signed(grid))

    def quantize_in_layer(self, x: Unquantized, grid: Grid) -> Tensor:
        """The same, done by the layer that gives the values, as where nothing else reads them."""
        return _in_layer(x.values, *x.ends(grid), grid, _is_signed(grid))

    def scale(self, grid: Grid) -> Tensor:
        """The step that OpenVINO makes of a grid's ends."""
        low, high = _ends(grid)
        return (high - low) / single(grid[3] - grid[2])

    def layer(self, sums: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        """float32 of integer sums: each product and sum is rounded."""
        values = sums.float() * factor
        return values if bias is None else values + bias

    def move(self, x: OnGrid, grid: Grid) -> Tensor:
        """The same values on another grid."""
        return self.quantize(x.values(), grid)

    def add(
        self,
        x: OnGrid,
        other: OnGrid | Tensor,
        grid: Grid,
        *,
        relu: bool = False,
        in_layer: bool = False,
        unrounded: Unquantized | None = None,
        signed: bool = True,
    ) -> Tensor:
        """A sum of what is on a grid and what is on another one, or on none, put on a third.

        It is computed in steps of `other`, where that is on a grid, else of `x`. oneDNN leaves out
        the rounding onto the first of two grids in a layer where a sum stands between them, and
        only cuts off where it ends.

        Args:
            x: what is put in steps of `other`.
            other: of the same shape, or of one that is repeated to it.
            grid: to put the sum on.
            relu: whether a ReLU stands in front of it.
            in_layer: whether a layer gives one of them, and so the sum.
            unrounded: what the layer gave for `x`, where it is added as it is.
            signed: whether it may be put there as signed integers, which those that read it take;
                an activation function takes float32.
        """
        assert x.grid is not None
        levels = single(x.high - x.low)
        origin, zero_point = _origin(x)
        factor, least = single(1), single(x.low - origin)
        if isinstance(other, OnGrid):
            other_origin, other_zero_point = _origin(other)
            step, others = other.scale, (other.integers - other_origin).float()
            zero = zero_point + other_zero_point * step / x.scale
            ends = [(end - zero) * (x.scale / step) for end in (least, least + levels)]
            least, factor = ends[0], (ends[1] - ends[0]) / levels
        else:
            step, others = x.scale, (other - zero_point * x.scale) * (1 / x.scale)
        if unrounded is None:
            steps = fused(x.integers - x.low, factor, least)
        else:
            onto, shift = _line(*unrounded.ends(x.grid), x.grid)
            steps = fused(unrounded.values, onto * factor, shift * factor + least)
            steps = steps.clamp(least, fused(levels, factor, least))
        total = steps + others
        low, high = (end / step for end in _ends(grid))
        put = _in_layer if in_layer else _by_itself
        signed = signed and _is_signed(grid)
        return put(total.relu() if relu else total, low, high, grid, signed)

    def silu(self, x: Tensor) -> Tensor:
        return sigmoid(x) * x


def _ends(grid: Grid) -> tuple[Tensor, Tensor]:
    scale, zero_point, low, high, _ = grid
    return single(low - zero_point) * single(scale), single(high - zero_point) * single(scale)


def _origin(x: OnGrid) -> tuple[int, Tensor]:
    """The integer that OpenVINO counts a grid's steps from, and the zero point from there: one
    rounding error off an integer now and then. There is none on a grid whose zero point lies in its
    middle: that is of signed integers."""
    assert x.grid is not None
    if _is_signed(x.grid):
        return x.grid[1], single(0)
    low, high = _ends(x.grid)
    # What is concatenated has its grid from elsewhere: another order of the same operations.
    return x.low, -low / x.scale if x.joined else _line(low, high, x.grid)[1]


def _is_signed(grid: Grid) -> bool:
    _, zero_point, low, high, _ = grid
    return 2 * (zero_point - low) == high - low + 1


def _line(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Factor and shift from values to steps from the least one of a grid between two ends."""
    levels = single(grid[3] - grid[2])
    return levels / (high - low), -low * levels / (high - low)


def _in_layer(x: Tensor, low: Tensor, high: Tensor, grid: Grid, signed: bool) -> Tensor:
    """Integers, where the layer that gives `x` puts it on the grid."""
    factor, shift = _line(low, high, grid)
    if signed or float(shift.abs().max()) < float(grid[3] - grid[2]) * _NO_SHIFT:
        # As a scale of the result, which it divides by.
        return _nearest(x * (1 / (1 / factor)), grid, grid[1] if signed else grid[2])
    return _nearest(fused(x, factor, shift), grid, grid[2])


def _by_itself(x: Tensor, low: Tensor, high: Tensor, grid: Grid, signed: bool) -> Tensor:
    """Integers, where an operation of its own does, with a sum in it or without."""
    factor = single(grid[3] - grid[2]) / (high - low)
    if signed:
        return _nearest(x * factor, grid, grid[1])
    return _nearest(x * factor - low * factor, grid, grid[2])


def _nearest(steps: Tensor, grid: Grid, origin: int) -> Tensor:
    return clamped(torch.round(steps).double() + origin, grid)


def exponential(x: Tensor) -> Tensor:
    """oneDNN's float32 `exp` of values that are not positive."""
    inside = x.clamp(min=_LEAST)
    octaves = (inside * single(_LOG2_E) + 0.5).floor()
    rest = fused(-octaves, single(_LN2), inside)
    result = single(_POLYNOMIAL[0]).expand_as(x)
    for coefficient in _POLYNOMIAL[1:]:
        result = fused(result, rest, single(coefficient))
    result = result * torch.exp2((octaves - 1).double()).float() * 2
    return torch.where(x < _LEAST, torch.zeros_like(x), result)


def sigmoid(x: Tensor) -> Tensor:
    """oneDNN's float32 logistic function."""
    powers = exponential(-x.abs())
    below = powers / (powers + 1)
    return torch.where(x.signbit(), below, 1 - below)

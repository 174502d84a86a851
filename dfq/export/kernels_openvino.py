"""What OpenVINO's CPU plugin computes between grids: integer sums, and behind them float32, step by
step as its kernels (oneDNN's) take them.

A convolution is an exact sum of integers, times a float32 factor, plus a float32 bias; then comes
the activation function in float32, by a polynomial of oneDNN's own, and one fused multiplication
and addition puts the result on the next grid. All of that is deterministic, and done here once
more, as found on a processor with AVX-512 and AMX; oneDNN has other kernels for others.
"""

from __future__ import annotations

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


class OpenVinoKernels:
    """The steps, a method an operation."""

    def quantize(self, x: Tensor, grid: Grid, *, in_layer: bool = False) -> Tensor:
        """Integers of float32 values, to the nearest even one.

        Args:
            x: of any shape.
            grid: to put them on.
            in_layer: whether the layer that gives them does that, as it does where nothing else
                reads them.
        """
        low, high = _ends(grid)
        return (_in_layer if in_layer else _by_itself)(x, low, high, grid)

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

    def add(self, x: OnGrid, other: Tensor, grid: Grid, *, relu: bool = False) -> Tensor:
        """A sum of what is on a grid and float32 values, put on another: computed in steps of the
        former, with its zero point as a quotient that nothing has rounded to an integer.

        Args:
            x, other: of the same shape.
            grid: to put the sum on.
            relu: whether a ReLU stands between.
        """
        assert x.grid is not None
        zero_point = -_ends(x.grid)[0] / x.scale
        others = (other - zero_point * x.scale) * (1 / x.scale)
        low, high = (end / x.scale for end in _ends(grid))
        total = x.integers.float() + others
        return _by_itself(total.relu() if relu else total, low, high, grid)

    def silu(self, x: Tensor) -> Tensor:
        return sigmoid(x) * x


def _ends(grid: Grid) -> tuple[Tensor, Tensor]:
    scale, zero_point, low, high, _ = grid
    return single(low - zero_point) * single(scale), single(high - zero_point) * single(scale)


def _in_layer(x: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """Integers, where the layer that gives `x` puts it on the grid."""
    levels = single(grid[3] - grid[2])
    factor, shift = levels / (high - low), -low * levels / (high - low)
    if abs(float(shift)) < float(levels) * _NO_SHIFT:
        # As a scale of the result, which it divides by.
        return _nearest(x * (1 / (1 / factor)), grid)
    return _nearest(fused(x, factor, shift.expand_as(x)), grid)


def _by_itself(x: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """Integers, where an operation of its own does, with a sum in it or without."""
    factor = single(grid[3] - grid[2]) / (high - low)
    return _nearest(x * factor - low * factor, grid)


def _nearest(steps: Tensor, grid: Grid) -> Tensor:
    return clamped(torch.round(steps).double() + grid[2], grid)


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

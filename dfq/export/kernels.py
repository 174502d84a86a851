"""What the integer kernels of onnxruntime (MLAS) and of LiteRT (XNNPACK) compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .on_grid import Grid, OnGrid, clamped, fused, single

_FINEST, _COARSEST = 2.0**-8, 2.0**7
"""Quotients of two steps that XNNPACK goes from one grid to the other with."""


class OnnxRuntimeKernels:
    """What onnxruntime's integer kernels compute, float32 factors and all."""

    def scale(self, grid: Grid) -> Tensor:
        """The step that integers are multiplied with."""
        return single(grid[0])

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        return clamped(torch.round(x / single(grid[0])).double() + grid[1], grid)

    def requantize(self, sums: Tensor, factor: Tensor, grid: Grid) -> Tensor:
        """Whole `sums` times a float32 factor, to the nearest even integer."""
        return clamped(torch.round(sums.float() * factor).double() + grid[1], grid)

    def bias(self, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """As whole numbers of the products' own step, of the scales of input and weight."""
        return torch.round(bias / (x * weight)).double()

    def layer_factor(self, x: OnGrid, weight: OnGrid, grid: Grid) -> Tensor:
        return x.scale * weight.scale / single(grid[0])

    def multiply(self, a: OnGrid, b: OnGrid, grid: Grid) -> Tensor:
        product = (a.integers - a.zero_point) * (b.integers - b.zero_point)
        return self.requantize(product, a.scale * b.scale / single(grid[0]), grid)

    def add(self, a: OnGrid, b: OnGrid, grid: Grid) -> Tensor:
        left, right = a.scale / single(grid[0]), b.scale / single(grid[0])
        zeros = fused(left, single(a.zero_point), right * b.zero_point)
        total = fused(b.integers, right, single(grid[1]) - zeros)
        return clamped(torch.round(fused(a.integers, left, total)).double(), grid)

    def average(
        self, x: OnGrid, function: Callable[[Tensor], Tensor], grid: Grid, *, pools: bool
    ) -> Tensor:
        """A pooling (`pools`) or an enlargement of what is on the grid that the result is on."""
        if not pools:
            return self.quantize(function(x.values()), grid)
        # Halves are frequent, and which integer is even is seen with the zero point.
        steps = function(x.values()) / single(grid[0]) + single(grid[1])
        return clamped(torch.round(steps).double(), grid)

    def sigmoid(self, x: OnGrid, grid: Grid) -> Tensor:
        return self.table(x, logistic, grid)

    def move(self, x: OnGrid, grid: Grid) -> Tensor:
        """The same values on another grid."""
        return self.table(x, lambda values: values, grid)

    def table(self, x: OnGrid, function: Callable[[Tensor], Tensor], grid: Grid) -> Tensor:
        """A function of each integer, looked up."""
        integers = torch.arange(x.low, x.high + 1, dtype=torch.float64)
        table = self.quantize(function(x.with_integers(integers).values()), grid)
        return table[(x.integers - x.low).long()]


class LiteRtKernels(OnnxRuntimeKernels):
    """What XNNPACK's kernels compute for LiteRT."""

    def sigmoid(self, x: OnGrid, grid: Grid) -> Tensor:
        return self.table(x, torch.sigmoid, grid)

    def bias(self, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        # Its converter divides in double precision.
        return torch.round(bias.double() / (x.double() * weight.double()))

    def add(self, a: OnGrid, b: OnGrid, grid: Grid) -> Tensor:
        left = float(a.scale / single(grid[0]))
        right = float(b.scale / single(grid[0]))
        # Fixed point of 20 bits or so, rounded half up.
        most = max(left, right)
        shift = 20 - _exponent(most)
        factors = [round(side * 2.0**shift) for side in (left, right)]
        total = 2.0 ** (shift - 1) - factors[0] * a.zero_point - factors[1] * b.zero_point
        total = total + a.integers * factors[0] + b.integers * factors[1]
        return clamped(torch.floor(total / 2.0**shift) + grid[1], grid)

    def move(self, x: OnGrid, grid: Grid) -> Tensor:
        ratio = x.scale / single(grid[0])
        if not _FINEST <= float(ratio) <= _COARSEST:
            # Not XNNPACK's.
            return super().move(x, grid)
        # Fixed point of 8 bits behind the point, rounded half up.
        factor = torch.round(256 * ratio).double()
        steps = ((x.integers - x.zero_point) * factor + 128) / 256
        return clamped(steps.floor() + grid[1], grid)

    def average(
        self, x: OnGrid, function: Callable[[Tensor], Tensor], grid: Grid, *, pools: bool
    ) -> Tensor:
        averages = function(x.integers)
        # Halves go away from the integer 0 in a pooling, which knows of no zero point, else up.
        nearest = (
            averages.sign() * (averages.abs() + 0.5).floor() if pools else (averages + 0.5).floor()
        )
        return clamped(nearest, grid)


def _exponent(number: float) -> int:
    return int(torch.frexp(torch.tensor(number, dtype=torch.float64))[1]) - 1


_ODD = 4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03
_EVEN = 6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03
_ODD_LAST, _EVEN_LAST = (2.48287947061529e-01,), (1.16817656904453e-01, 9.93151921023180e-01)
"""Coefficients of MLAS's sigmoid, of Eigen's rational approximation: of the odd powers from 9 down
to 1, and of the even ones from 10 to 0."""


def logistic(x: Tensor) -> Tensor:
    """The sigmoid of float32 values as MLAS computes it: on a processor with fused
    multiply-adds, a quotient of two polynomials, up to 2e-7 beside the exact one. That decides how
    a value next to a half is rounded."""
    value = x.float().clamp(-18.0, 18.0)
    square = value * value

    def polynomial(coefficients: tuple[float, ...]) -> Tensor:
        result = torch.full_like(value, coefficients[0])
        for coefficient in coefficients[1:]:
            result = fused(result, square, single(coefficient))
        return result

    odd, even = polynomial(_ODD + _ODD_LAST) * value, polynomial(_EVEN + _EVEN_LAST)
    return (odd / even + 0.5).clamp(0.0, 1.0)

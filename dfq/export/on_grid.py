"""Tensors of whole numbers that stand for values on a grid, and sums rounded as kernels round."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Grid = tuple[float, int, int, int, torch.dtype]
"""Scale, zero point, least and largest integer, and their type, as a quantize is given them."""


@dataclass(frozen=True)
class OnGrid:
    """A tensor on a grid.

    Attributes:
        integers: float64 whole numbers, of any shape.
        scale: float32, a scalar or `(channels,)`.
        zero_point: whole number.
        low, high: of the integer type.
        axis: of the channels; None per tensor.
        grid: what a quantize was given to put it there; None per channel.
        joined: whether a concatenation reads it.
    """

    integers: Tensor
    scale: Tensor
    zero_point: int
    low: int
    high: int
    axis: int | None = None
    grid: Grid | None = None
    joined: bool = False

    def values(self) -> Tensor:
        """float32."""
        scale = self.scale
        if self.axis is not None:
            shape = [1] * self.integers.ndim
            shape[self.axis] = -1
            scale = scale.view(shape)
        return (self.integers - self.zero_point).float() * scale

    def with_integers(self, integers: Tensor) -> OnGrid:
        """Others on the same grid."""
        return replace(self, integers=integers)


def clamped(integers: Tensor, grid: Grid) -> Tensor:
    """Cut off where the integers of a grid end."""
    return integers.clamp(grid[2], grid[3])


def single(number: float) -> Tensor:
    """A number as float32."""
    return torch.tensor(number, dtype=torch.float32)


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c`, rounded to float32 once, as the processor's instruction does."""
    return (a.double() * b.double() + c.double()).float()

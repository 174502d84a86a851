"""Grids as runtimes write them: 8 or 16 bits of integers with a step and a zero point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantization.layers import QuantConv2d, QuantLinear
from ..quantization.quantizers import Quantizer


@dataclass(frozen=True)
class Grid:
    """A per-tensor grid: value = scale * (integer - zero_point), integer in [low, high].

    Attributes:
        scale: step, exactly a float32.
        zero_point: integer of real zero.
        low, high: least and largest integer in use; fewer than the type has below 8 bits.
        dtype: of the integers: torch.uint8, int8, uint16 or int16.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype

    @property
    def limits(self) -> tuple[int, int]:
        """Least and largest integer of the type."""
        info = torch.iinfo(self.dtype)
        return info.min, info.max

    @property
    def fills_type(self) -> bool:
        """Whether every integer of the type is in use, so that saturation clamps as the grid."""
        return (self.low, self.high) == self.limits

    @property
    def values(self) -> tuple[float, float]:
        """Least and largest value on the grid."""
        return (
            self.scale * (self.low - self.zero_point),
            self.scale * (self.high - self.zero_point),
        )

    def arguments(self) -> tuple[float, int, int, int, torch.dtype]:
        """What `torch.ops.quantized_decomposed.quantize_per_tensor` takes behind its input."""
        return (self.scale, self.zero_point, *self.limits, self.dtype)


def grid_of(quantizer: Quantizer, *, signed: bool) -> Grid:
    """The grid of a per-tensor quantizer of activations, in integers of 8 bits, or of 16 above.

    The values are the same for signed and unsigned integers: all of them are moved by half of what
    the type holds, the zero point too. Grids of fewer bits keep their integers.
    """
    low, high = quantizer.bounds
    zero = int(quantizer.zero_point.detach().round().clamp(low, high))
    wide = quantizer.bits > 8
    half = 2**15 if wide else 2**7
    if signed:
        dtype = torch.int16 if wide else torch.int8
        shift = -half if low == 0 and high >= half else 0
    else:
        dtype = torch.uint16 if wide else torch.uint8
        shift = half if low < 0 else 0
    scale = float(quantizer.scale.detach())
    return Grid(scale, zero + shift, low + shift, high + shift, dtype)


BIAS_STEPS = 2.0**30
"""Most steps of its products that a bias may have: kernels hold it in 32 bits, with their sum."""


@torch.no_grad()
def integer_weight(layer: QuantConv2d | QuantLinear) -> tuple[Tensor, Tensor]:
    """A layer's weight as integers and steps: weight = scale * integer, without a zero point.

    Where a channel's products are negligible beside its bias, as those of dead channels are, its
    step is coarser than in the network: else its bias would not fit into 32 bits.

    Returns:
        int8 of the weight's shape, within [-127, 127] but for grids that use -128 (asymmetric ones
        of fewer bits never reach it); float32 `(out,)`, the same for all where the grid is per
        tensor.
    """
    quantizer, weight = layer.weight_quantizer, layer.weight
    integers = quantizer.integers(weight).to(torch.int8)
    scale = quantizer.scale.detach().expand(len(weight)).contiguous()
    if layer.bias is None:
        return integers, scale
    least = layer.bias.detach().abs() / (layer.input_quantizer.scale.detach() * BIAS_STEPS)
    coarser = torch.maximum(scale, least)
    share = (scale / coarser).view(-1, *([1] * (weight.ndim - 1)))
    return torch.where(share < 1, (integers * share).round(), integers).to(torch.int8), coarser

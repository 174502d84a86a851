"""What stands for quantized layers in the reference program: quantize and dequantize operations
around float ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.nn.matmul import Matmul
from ..quantization.layers import (
    QuantConv2d,
    QuantLinear,
    QuantMatmul,
    SplitOutput,
    gated_silu,
    kinds_together,
)
from ..quantization.quantizers import Quantizer
from .grids import Grid, integer_weight

OPS = torch.ops.quantized_decomposed


class Ends(nn.Module):
    """Cuts a tensor off where a grid ends, without putting it there."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(*self.grid.values)


class QuantizeDequantize(nn.Module):
    """Puts a tensor on a grid, as runtimes are told to: quantize, then dequantize."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        if not self.grid.fills_type:
            # Runtimes saturate where the integer type ends, not where a narrower grid does.
            x = x.clamp(*self.grid.values)
        arguments = self.grid.arguments()
        return OPS.dequantize_per_tensor(OPS.quantize_per_tensor(x, *arguments), *arguments)


class Weight(nn.Module):
    """A layer's weight as int8 constants with one dequantize.

    Args:
        layer: quantized.
        floating: keep the weight itself, quantized and dequantized in the program, as LiteRT's
            converter wants it.
        plain: the values themselves, in float32.
        columns: transposed, with the outputs in the last axis.
        outputs: channels to take; None: all.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        layer: QuantConv2d | QuantLinear,
        *,
        floating: bool,
        plain: bool = False,
        columns: bool = False,
        outputs: Tensor | None = None,
    ) -> None:
        super().__init__()
        integers, scale = integer_weight(layer)
        if outputs is not None:
            integers, scale = integers[outputs], scale[outputs] if len(scale) > 1 else scale
        self.floating, self.plain, self.axis = floating, plain, 1 if columns else 0
        if columns:
            integers = integers.flatten(1).T.contiguous()
        if floating or plain:
            shape = [1] * integers.ndim
            shape[self.axis] = -1
            self.register_buffer("values", integers.float() * scale.view(shape))
        else:
            self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(len(scale), dtype=torch.int64))

    def forward(self) -> Tensor:
        if self.plain:
            return self.values
        where = (self.scale, self.zero_point, self.axis, -127 if self.floating else -128, 127)
        integers = (
            OPS.quantize_per_channel(self.values, *where, torch.int8)
            if self.floating
            else self.integers
        )
        return OPS.dequantize_per_channel(integers, *where, torch.int8)


class Layer(nn.Module):
    """A convolution or linear layer in the program."""

    def __init__(
        self,
        layer: QuantConv2d | QuantLinear,
        grid: Callable[[Quantizer | None], nn.Module],
        *,
        floating: bool,
        plain: bool,
        as_product: bool,
    ) -> None:
        super().__init__()
        self.on_input = grid(layer.input_quantizer)
        split = layer.output_quantizer
        groups: list[Tensor | None] = [None]
        if isinstance(split, SplitOutput):
            # Each group is a layer of its own, which alone has its output on one grid.
            self.on_output = nn.ModuleList(grid(quantizer) for quantizer in split)
            kinds = range(len(split))
            groups = [torch.tensor(split.kinds.channels(kind)) for kind in kinds]
            self.repeats, self.channel_axis = split.kinds.repeats, split.axis
        else:
            self.on_output = nn.ModuleList([grid(split)])
        self.bias = nn.ParameterList()
        if layer.bias is not None:
            # Of a product it is subtracted.
            bias = -layer.bias.detach() if as_product else layer.bias.detach()
            parts = [bias if group is None else bias[group] for group in groups]
            self.bias.extend(map(_uneven, parts) if floating else parts)
            self.bias.requires_grad_(False)
        self.convolution = layer if isinstance(layer, QuantConv2d) else None
        # Of a module that is a child, the parameters would be exported too.
        if self.convolution is not None:
            conv = self.convolution
            self.geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            self.padding_mode, self.pads = conv.padding_mode, conv._reversed_padding_repeated_twice
        del self.convolution
        self.is_convolution = isinstance(layer, QuantConv2d)
        self.as_product = as_product
        self.weight = nn.ModuleList(
            Weight(layer, floating=floating, plain=plain, columns=as_product, outputs=group)
            for group in groups
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.on_input(x)
        parts = []
        for index, (weight, on_output) in enumerate(zip(self.weight, self.on_output, strict=True)):
            bias = self.bias[index] if len(self.bias) else None
            parts.append(on_output(self._compute(x, weight(), bias)))
        if len(parts) == 1:
            return parts[0]
        # Which a pass takes apart again, or keeps in float: see `passes`.
        by_kind = [part.unflatten(self.channel_axis, (self.repeats, -1)) for part in parts]
        return kinds_together(by_kind, self.channel_axis)

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.as_product:
            rows = x.permute(0, 2, 3, 1) if self.is_convolution else x
            y = torch.matmul(rows, weight)
            if bias is not None:
                # Of a sum, onnxruntime makes one float layer with the product.
                y = y - bias
            return y.permute(0, 3, 1, 2) if self.is_convolution else y
        if not self.is_convolution:
            return F.linear(x, weight, bias)
        stride, padding, dilation, groups = self.geometry
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.pads, mode=self.padding_mode), (0, 0)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


class Product(Matmul):
    """A product of two activations in the program."""

    def __init__(self, layer: QuantMatmul, grid: Callable[[Quantizer], nn.Module]) -> None:
        super().__init__()
        self.left, self.right = grid(layer.left_quantizer), grid(layer.right_quantizer)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(self.left(left), self.right(right))


class GatedSiLU(nn.Module):
    """SiLU in two steps, with its sigmoid on a grid."""

    def __init__(self, step: float, *, signed: bool) -> None:
        super().__init__()
        low = -128 if signed else 0
        dtype = torch.int8 if signed else torch.uint8
        scale = float(torch.tensor(step))
        self.on_sigmoid = QuantizeDequantize(Grid(scale, low, low, low + 255, dtype))

    def forward(self, x: Tensor) -> Tensor:
        return gated_silu(x, self.on_sigmoid)


def _uneven(bias: Tensor) -> Tensor:
    """A bias that is not one number throughout, by one rounding error: LiteRT's converter puts such
    a bias on the grid of the first channel, though the others have grids of their own."""
    if len(bias) < 2 or not (bias == bias[0]).all():
        return bias
    first = bias[:1].nextafter(bias.new_tensor([torch.inf]))
    return torch.cat([first, bias[1:]])

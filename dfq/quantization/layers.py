"""Quantized Conv2d and Linear: the float layer with a quantizer on its input and on its weight;
and the quantized product of two activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import (
    handle_torch_function,
    has_torch_function,
    has_torch_function_unary,
)

from ..models.base import Kinds
from ..models.nn.matmul import Matmul
from .quantizers import Quantizer, fake_quantize


class SplitOutput(nn.ModuleList):
    """A quantizer for each kind of what a layer gives, where it gives several.

    Args:
        quantizers: per tensor, one a kind.
        kinds: how the layer's output channels are divided among them.
        axis: of the channels: 1, or -1.
    """

    def __init__(self, quantizers: Sequence[Quantizer], kinds: Kinds, axis: int) -> None:
        super().__init__(quantizers)
        self.kinds, self.axis = kinds, axis

    def forward(self, x: Tensor) -> Tensor:
        parts = kinds_apart(x, self.kinds, self.axis)
        quantized = [quantizer(part) for quantizer, part in zip(self, parts, strict=True)]
        return kinds_together(quantized, self.axis)


def kinds_apart(x: Tensor, kinds: Kinds, axis: int) -> Sequence[Tensor]:
    """The channels of each kind, with an axis of its own for the repeats before theirs.

    `graph.tracing` sees this as one function and follows `x` through it; the functions it calls are
    not counted.

    Args:
        x: `(n, c, h, w)` for axis 1, `(..., c)` for axis -1.
        kinds: how the c channels are divided.
        axis: of the channels.

    Returns:
        Of each kind `(n, repeats, size, h, w)` or `(..., repeats, size)`.
    """
    if has_torch_function_unary(x):
        result: Sequence[Tensor] = handle_torch_function(kinds_apart, (x,), x, kinds, axis)
        return result
    return x.unflatten(axis, (kinds.repeats, -1)).split(kinds.sizes, _inner(axis))


def kinds_together(parts: Sequence[Tensor], axis: int) -> Tensor:
    """The inverse of `kinds_apart`: its parts as one tensor `(n, c, h, w)` or `(..., c)`."""
    if has_torch_function(parts):
        result: Tensor = handle_torch_function(kinds_together, parts, parts, axis)
        return result
    inner = _inner(axis)
    return torch.cat(list(parts), inner).flatten(inner - 1, inner)


def _inner(axis: int) -> int:
    return 2 if axis == 1 else -1


class QuantConv2d(nn.Conv2d):
    """A convolution whose input and weight are fake-quantized.

    `input_quantizer` is per tensor; `weight_quantizer` per tensor or per output channel. The bias
    stays in float: runtimes keep it in 32 bits. `output_quantizer`, per tensor or per group of
    channels, is for runtimes that compute in integers only what they can put on a grid at once (see
    `results`).
    """

    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    output_quantizer: Quantizer | SplitOutput | None

    @classmethod
    def wrap(cls, layer: nn.Conv2d, inputs: Quantizer, weights: Quantizer) -> QuantConv2d:
        """Take over the parameters of a float convolution."""
        quantized = cls.__new__(cls)
        nn.Module.__init__(quantized)
        quantized.__dict__.update(
            {k: v for k, v in layer.__dict__.items() if not k.startswith("_")},
            training=layer.training,
        )
        # nn.Conv2d keeps the padding of its non-zero padding modes under a private name.
        quantized._reversed_padding_repeated_twice = layer._reversed_padding_repeated_twice
        return _take_over(quantized, layer, inputs, weights)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        output = self._conv_forward(self.input_quantizer(input), weight, self.bias)
        return output if self.output_quantizer is None else self.output_quantizer(output)


class QuantLinear(nn.Linear):
    """A linear layer whose input and weight are fake-quantized; see `QuantConv2d`."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    output_quantizer: Quantizer | SplitOutput | None

    @classmethod
    def wrap(cls, layer: nn.Linear, inputs: Quantizer, weights: Quantizer) -> QuantLinear:
        """Take over the parameters of a float linear layer."""
        quantized = cls.__new__(cls)
        nn.Module.__init__(quantized)
        quantized.in_features = layer.in_features
        quantized.out_features = layer.out_features
        quantized.training = layer.training
        return _take_over(quantized, layer, inputs, weights)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        output = F.linear(self.input_quantizer(input), weight, self.bias)
        return output if self.output_quantizer is None else self.output_quantizer(output)


_Layer = TypeVar("_Layer", QuantConv2d, QuantLinear)


def _take_over(
    quantized: _Layer, layer: nn.Conv2d | nn.Linear, inputs: Quantizer, weights: Quantizer
) -> _Layer:
    """Give `quantized` the very parameters of `layer`, not copies, and its quantizers."""
    quantized.weight = layer.weight
    quantized.register_parameter("bias", layer.bias)
    quantized.input_quantizer = inputs
    quantized.weight_quantizer = weights
    quantized.output_quantizer = None
    return quantized


QUANTIZED_LAYERS = (QuantConv2d, QuantLinear)
"""Those with a weight."""


class QuantMatmul(Matmul):
    """A product of two activations, each fake-quantized per tensor: in attention, of queries and
    keys, and of the softmax's output and the values."""

    def __init__(self, left: Quantizer, right: Quantizer) -> None:
        super().__init__()
        self.left_quantizer = left
        self.right_quantizer = right

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(self.left_quantizer(left), self.right_quantizer(right))


class QuantSiLU(nn.Module):
    """SiLU with its sigmoid on a grid of 8 bits from zero, as runtimes compute it in integers.

    Args:
        step: of the grid, 1/255 or 1/256. It is no parameter: a sigmoid ends at 1.

    Attributes:
        enabled: False computes the sigmoid in float.
    """

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return gated_silu(x, self._on_grid) if self.enabled else F.silu(x)

    def _on_grid(self, gate: Tensor) -> Tensor:
        scale = torch.full((1,), self.step, dtype=gate.dtype, device=gate.device)
        return fake_quantize(gate, scale, torch.zeros_like(scale), 0, 255)


def gated_silu(x: Tensor, on_grid: Callable[[Tensor], Tensor]) -> Tensor:
    """`x * on_grid(sigmoid(x))`, of the shape of `x`.

    `graph.tracing` sees it as SiLU, the one function that it replaces."""
    if has_torch_function_unary(x):
        result: Tensor = handle_torch_function(gated_silu, (x,), x, on_grid)
        return result
    return x * on_grid(x.sigmoid())


gated_silu.__name__ = "silu"

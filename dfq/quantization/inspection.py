"""List a detector's layers: what each costs, what is quantized and what is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..graph.outline import outline
from ..models.base import Model
from .layers import QUANTIZED_LAYERS, QuantMatmul

FLOAT_BITS = 32

FLOAT_KINDS = ("deconv", "attention")
"""Kinds of layers that are listed and stay in float: what is left of transposed convolutions and of
PyTorch's own attention after `models.nn.decomposed`."""


@dataclass(frozen=True)
class LayerInfo:
    """One layer as `dfq inspect` lists it. `macs` is for one image.

    `kind` is conv or linear; matmul: a product of two activations, without a weight, whose
    `weight_bits` are its left operand's; or one of `FLOAT_KINDS`.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    weight_bits: int
    activation_bits: int

    @property
    def quantized(self) -> bool:
        return self.weight_bits < FLOAT_BITS and self.activation_bits < FLOAT_BITS

    @property
    def wide(self) -> bool:
        """Whether its activations have more than the 8 bits that runtimes have kernels for."""
        return self.quantized and self.activation_bits > 8

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "quantized": self.quantized}


def _bits(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, QUANTIZED_LAYERS):
        return layer.weight_quantizer.bits, layer.input_quantizer.bits
    if isinstance(layer, QuantMatmul):
        return layer.left_quantizer.bits, layer.right_quantizer.bits
    return FLOAT_BITS, FLOAT_BITS


def list_layers(detector: Model, image_size: int | None = None) -> list[LayerInfo]:
    """Every layer of weights and every product of activations that computes predictions, in
    execution order.

    Layers that `Model.raw` does not run (a decoder's constant convolution, say) are not listed.
    """
    rows = outline(detector, image_size).layers
    bits = (_bits(detector.module.get_submodule(row.name)) for row in rows)
    return [
        LayerInfo(row.name, row.kind, row.weight_shape, row.output_shape, row.macs, *widths)
        for row, widths in zip(rows, bits, strict=True)
    ]


def quantized_share(layers: Iterable[LayerInfo]) -> float:
    """Share of the multiply-accumulates that run on quantized weights and inputs, in [0, 1]."""
    layers = list(layers)
    total = sum(layer.macs for layer in layers)
    return sum(layer.macs for layer in layers if layer.quantized) / total if total else 0.0


def weight_bytes(layers: Iterable[LayerInfo]) -> float:
    """What the weights of the layers take at their bits, bytes."""
    return sum(
        math.prod(row.weight_shape) * row.weight_bits / 8 for row in layers if row.weight_shape
    )


def bit_operations(layers: Iterable[LayerInfo]) -> int:
    """BOPs of one image: weight bits * activation bits * MACs, summed over the layers."""
    return sum(row.weight_bits * row.activation_bits * row.macs for row in layers)


@dataclass(frozen=True)
class Inspection:
    """What `dfq inspect` shows: every layer, and the sums over them; of the sums and concatenations
    of activations, how many are quantized and how many there are; the categories by index."""

    source: str
    family: str
    image_size: int
    layers: Sequence[LayerInfo]
    adds_and_concats: tuple[int, int]
    names: Sequence[str] = ()

    @property
    def quantized_share(self) -> float:
        """Share of the multiply-accumulates that are quantized, in [0, 1]."""
        return quantized_share(self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.source,
            "family": self.family,
            "image_size": self.image_size,
            "categories": list(self.names),
            "macs": sum(layer.macs for layer in self.layers),
            "bit_operations": bit_operations(self.layers),
            "quantized_share_of_macs": self.quantized_share,
            "sums_and_concatenations": {
                "quantized": self.adds_and_concats[0],
                "all": self.adds_and_concats[1],
            },
            "layers": [layer.to_dict() for layer in self.layers],
        }

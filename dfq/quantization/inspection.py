"""List a detector's layers: what each costs, what is quantized and what is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.tracing import WEIGHTED
from ..models.base import Detector
from ..models.nn.matmul import Matmul
from .layers import QUANTIZED_LAYERS, QuantMatmul

FLOAT_BITS = 32

FLOAT_KINDS = ("deconv", "attention")
"""Kinds of layers that are listed and stay in float: what is left of transposed convolutions and of
PyTorch's own attention after `models.nn.decomposed`."""

LISTED = (*WEIGHTED, Matmul)


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


def describe(detector: Detector, image_size: int | None = None) -> list[LayerInfo]:
    """Every layer of weights and every product of activations that computes predictions, in
    execution order.

    Layers that `Detector.raw` does not run (a decoder's constant convolution, say) are not listed.
    """
    size = image_size or detector.image_size
    rows: dict[str, LayerInfo] = {}
    handles = []
    for name, module in detector.module.named_modules():
        if not isinstance(module, LISTED):
            continue

        def after(
            layer: nn.Module,
            inputs: tuple[Tensor, ...],
            named: dict[str, Tensor],
            output: Any,
            name: str = name,
        ) -> None:
            kind, shape, macs = _cost(layer, [*inputs, *named.values()], output)
            first = output[0] if isinstance(output, tuple) else output
            before = rows[name].macs if name in rows else 0
            rows[name] = LayerInfo(
                name, kind, shape, tuple(first.shape[1:]), macs + before, *_bits(layer)
            )

        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with torch.no_grad():
            detector.raw(torch.zeros(1, 3, size, size, device=detector.device))
    finally:
        for handle in handles:
            handle.remove()
    return list(rows.values())


def _cost(
    layer: nn.Module, inputs: Sequence[Tensor], output: Any
) -> tuple[str, tuple[int, ...], int]:
    """Kind, weight shape and MACs of one call of a layer."""
    # All of the output: rows may be windows or proposals of the one image.
    if isinstance(layer, Matmul):
        return "matmul", (), output.numel() * inputs[0].shape[-1]
    if isinstance(layer, nn.MultiheadAttention):
        width, queries, keys = layer.embed_dim, inputs[0].numel(), inputs[1].numel()
        # Projections of queries, output, keys and values, and the two products (one image).
        return "attention", (), 2 * (queries + keys) * width + 2 * queries * keys // width
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.ConvTranspose2d):
        # Each input element is multiplied with one filter: all of the weight but its input axis.
        return "deconv", tuple(weight.shape), inputs[0].numel() * weight[0].numel()
    kind = "linear" if isinstance(layer, nn.Linear) else "conv"
    # Each output element costs one filter: all of the weight but its output axis.
    return kind, tuple(weight.shape), output.numel() * weight[0].numel()


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
    joins: tuple[int, int]
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
            "sums_and_concatenations": {"quantized": self.joins[0], "all": self.joins[1]},
            "layers": [layer.to_dict() for layer in self.layers],
        }

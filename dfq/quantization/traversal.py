"""The quantized layers and the quantizers of a network, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .layers import QUANTIZED_LAYERS, QuantConv2d, QuantLinear, QuantMatmul, QuantSiLU
from .output_quantizers import output_quantizers
from .quantizers import Quantizer


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear]]:
    """(name, layer) of every quantized layer."""
    for name, layer in module.named_modules():
        if isinstance(layer, QUANTIZED_LAYERS):
            yield name, layer


def product_quantizers(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer) of both operands of every quantized product of activations."""
    for name, layer in module.named_modules():
        if isinstance(layer, QuantMatmul):
            yield f"{name}.left_quantizer", layer.left_quantizer
            yield f"{name}.right_quantizer", layer.right_quantizer


def activation_quantizers(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer) of every activation that is quantized: a layer's input under the name of
    the layer, all others under their own. One that is in several places has the first's name."""
    inputs = [(name, layer.input_quantizer) for name, layer in quantized_layers(module)]
    seen: set[Quantizer] = set()
    for name, quantizer in (*inputs, *product_quantizers(module), *output_quantizers(module)):
        if quantizer not in seen:
            seen.add(quantizer)
            yield name, quantizer


@contextmanager
def float_mode(module: nn.Module) -> Iterator[None]:
    """Disables fake quantization within the context."""
    quantizers = [m for m in module.modules() if isinstance(m, (Quantizer, QuantSiLU))]
    before = [q.enabled for q in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in zip(quantizers, before, strict=True):
            quantizer.enabled = enabled

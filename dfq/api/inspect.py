"""`dfq inspect`: the layers of a detector."""

from __future__ import annotations

from pathlib import Path

from ..models.base import Model
from ..quantization.inspection import Inspection, list_layers
from ..quantization.output_quantizers import count_adds_and_concats
from ..runs.loading import load_model
from .evaluate import evaluate as evaluate


def inspect(model: str | Path | Model, *, trust: bool = False) -> Inspection:
    """Every conv and linear layer of a detector or a run, its shape, MACs and bits; how many of its
    sums and concatenations of activations are quantized.

    Example:
        >>> found = dfq.inspect("run")
        >>> found.quantized_share, {layer.weight_bits for layer in found.layers}
        (1.0, {8})
    """
    detector = model if isinstance(model, Model) else load_model(model, trust=trust)
    layers, adds_and_concats = list_layers(detector), count_adds_and_concats(detector)
    return Inspection(
        detector.source,
        detector.family,
        detector.image_size,
        layers,
        adds_and_concats,
        tuple(detector.names),
    )

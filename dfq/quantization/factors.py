"""What integer kernels can multiply by, between a layer's sums and the grid of its output."""

from __future__ import annotations

import torch
from torch import nn

from .layers import QUANTIZED_LAYERS
from .quantizers import Quantizer

MOST = 128.0
"""Steps of the output in a step of the products. XNNPACK takes less than 256 and makes no runtime
of a file that has more; beyond 2^31 LiteRT's own kernels end the process."""


@torch.no_grad()
def bound_factors(module: nn.Module) -> None:
    """Coarsen, in place, grids of layers' outputs that are finer than any sum of products.

    The outputs of such a layer have vanished beside its input, as they do in networks with random
    weights; no value that the layer can give is lost.
    """
    for layer in module.modules():
        if not isinstance(layer, QUANTIZED_LAYERS) or layer.output_quantizer is None:
            continue
        least = layer.input_quantizer.scale.max() * layer.weight_quantizer.scale.max() / MOST
        for quantizer in layer.output_quantizer.modules():
            if isinstance(quantizer, Quantizer) and bool((quantizer.scale < least).any()):
                zero = quantizer.zero_point.detach().clone()
                quantizer.initialise(quantizer.scale.clamp_min(least), zero)

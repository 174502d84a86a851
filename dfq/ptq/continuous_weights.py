"""AdaQuant (Hubara et al., ICML 2021): weights themselves are learned, straight through rounding.

Layer by layer, with step sizes s_w and s_x of the weights and of the layer's input,

    min over s_w, s_x, V of || W X - Q_{s_w}(W + V) Q_{s_x}(X) ||^2,

so that, unlike with rounding variables, a weight may end at any level of its grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantization.quantizers import Quantizer


class ContinuousWeight(nn.Module):
    """Takes the place of a layer's weight quantizer while its weights are learned.

    Args:
        quantizer: of the weights, calibrated; its step sizes may be learned along.
        weight: W, the float weights, in the layer's shape.

    Attributes:
        variable: V in that shape, in units of the step sizes that there are at the start.
        quantizer: as given.
    """

    weight: Tensor
    unit: Tensor
    quantizer: Quantizer

    @torch.no_grad()
    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        # Not a submodule: it is none of the block's activations.
        object.__setattr__(self, "quantizer", quantizer)
        weight = weight.detach().float()
        self.register_buffer("weight", weight)
        self.register_buffer("unit", quantizer.scale_of(weight))
        self.variable = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Q(W + V), whatever the weight is: its values are in `weight` and `variable`."""
        quantized: Tensor = self.quantizer(self.weight + self.unit * self.variable)
        return quantized

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """The weights on their grid."""
        return self(self.weight)

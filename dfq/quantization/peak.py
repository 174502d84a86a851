"""An even grid for the outputs of softmax that keeps their greatest value.

APQ-ViT (Ding et al., ACM MM 2022) calls it Matthew-effect Preserving Quantization:

    s = max(p) / (2^b - 1),        p_hat = s * round(p / s).

Attention is where few outputs are large and nearly all are close to zero. A search for the least
error gives the many their levels and clips the few, which say what a token looks at; here the few
are kept, whatever that costs the many. The paper published no code to compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantizers import Quantizer


class PeakQuantizer(Quantizer):
    """A quantizer of values that are not below zero, per tensor, with all levels above it.

    Its step size is that of the greatest value seen; no search and no training moves it.
    """

    searched = False

    def __init__(self, bits: int) -> None:
        super().__init__(bits, asymmetric=True)
        self.log_scale.requires_grad_(False)
        self.zero_point.requires_grad_(False)

    @torch.no_grad()
    def fit(self, values: Tensor) -> None:
        """Set the step size from values `(n,)`, the greatest one among them."""
        self.initialise(values.max().clamp_min(0).reshape(1) / (2**self.bits - 1))

    def extra_repr(self) -> str:
        return f"{self.bits} bit, up to the greatest value"

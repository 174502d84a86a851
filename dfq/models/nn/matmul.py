"""A product of two activations as a layer, so that it can be found, listed and quantized."""

from __future__ import annotations

from torch import Tensor, nn


class Matmul(nn.Module):
    """The batched matrix product of two activations, as in attention; it has no parameters."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """`(..., n, k)` and `(..., k, m)` to `(..., n, m)`."""
        return left @ right

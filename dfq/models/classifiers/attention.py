"""Self-attention of one joint projection, with its products as layers of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn.matmul import Matmul


class DecomposedSelfAttention(nn.Module):
    """timm's `Attention`, out of the very parts of one; checkpoints fit as before.

    Attributes:
        scores, mix: the products of queries and keys, and of the softmax and the values.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = layer.num_heads, layer.scale
        self.qkv, self.proj = layer.qkv, layer.proj
        self.q_norm, self.k_norm, self.norm = layer.q_norm, layer.k_norm, layer.norm
        self.scores, self.mix = Matmul(), Matmul()

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether the layer can be replaced."""
        parts = ("qkv", "q_norm", "k_norm", "norm", "proj", "num_heads", "scale")
        return all(hasattr(layer, part) for part in parts) and getattr(layer, "gate", None) is None

    def forward(self, x: Tensor, **_unused: Any) -> Tensor:
        """Tokens `(n, tokens, width)` to the same."""
        # (3, n, heads, tokens, width of a head)
        parts = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        scores = self.scores(query * self.scale, key.transpose(-2, -1))
        mixed = self.mix(scores.softmax(dim=-1), value)
        return self.proj(self.norm(mixed.transpose(1, 2).flatten(2)))

"""mmdet's window attention with its two products as layers of their own."""

from __future__ import annotations

from mmdet.models.backbones.swin import WindowMSA
from torch import Tensor, nn

from ..nn.matmul import Matmul


class DecomposedWindowMSA(WindowMSA):
    """Computes what `WindowMSA` does. `scores` multiplies queries and keys, `mix` the softmax and
    the values; both are modules without parameters, so that checkpoints fit as before."""

    scores: Matmul
    mix: Matmul

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention within windows.

        Args:
            x: tokens `(windows, tokens, channels)`, the windows of an image one after another.
            mask: added to the scores, `(windows of an image, tokens, tokens)`, or None.
        """
        windows, tokens, channels = x.shape
        parts = self.qkv(x).view(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        scores = self.scores(query * self.scale, key.transpose(-2, -1))
        place = self.relative_position_bias_table[self.relative_position_index.flatten()]
        scores = scores + place.view(tokens, tokens, self.num_heads).permute(2, 0, 1)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        mixed = self.mix(self.attn_drop(self.softmax(scores)), value)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(windows, tokens, channels)))


def expose_products(module: nn.Module) -> None:
    """Make every window attention of a network an `DecomposedWindowMSA`, in place."""
    for layer in module.modules():
        if type(layer) is WindowMSA:
            layer.__class__ = DecomposedWindowMSA
            layer.scores, layer.mix = Matmul(), Matmul()

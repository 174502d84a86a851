"""Layers that hide convolutions or products of activations, rebuilt from parts that show them.

What dfq lists, quantizes and rounds are convolutions, linear layers and `Matmul`s. Each class here
computes what the layer of PyTorch that it replaces computes, out of such parts, and takes that
layer's tensors from checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .matmul import Matmul


class DecomposedDeconv(nn.Module):
    """A transposed convolution whose patches do not overlap, as Mask R-CNN enlarges its masks with:
    a 1 x 1 convolution that gives all pixels of a patch as channels, and a shuffle.

    Attributes:
        conv: its output channels are (channel, row, column) of the patch.
    """

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        side = layer.kernel_size[0]
        outputs = layer.out_channels * side * side
        self.conv = nn.Conv2d(layer.in_channels, outputs, 1, bias=layer.bias is not None)
        self.shuffle = nn.PixelShuffle(side)
        self.load_state_dict(layer.state_dict())

    @staticmethod
    def fits(layer: nn.ConvTranspose2d) -> bool:
        """Whether the layer can be replaced."""
        side = layer.kernel_size[0]
        return (
            layer.kernel_size == layer.stride == (side, side)
            and layer.padding == layer.output_padding == (0, 0)
            and layer.dilation == (1, 1)
            and layer.groups == 1
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            # (in, out, rows, columns) to (out * rows * columns, in, 1, 1).
            rows = weight.permute(1, 2, 3, 0).reshape(-1, weight.shape[0], 1, 1)
            state_dict[f"{prefix}conv.weight"] = rows
        bias = state_dict.pop(f"{prefix}bias", None)
        if bias is not None:
            pixels = self.shuffle.upscale_factor**2
            state_dict[f"{prefix}conv.bias"] = bias.repeat_interleave(pixels)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, in, h, w)` to `(n, out, h * k, w * k)`."""
        return self.shuffle(self.conv(x))


class DecomposedAttention(nn.Module):
    """`nn.MultiheadAttention` with its projections as linear layers and its products as layers of
    their own. Gives None in place of the attention weights, which detectors do not read.

    Attributes:
        query, key, value, out_proj: the projections.
        scores, mix: the products of queries and keys, and of the softmax and the values.
    """

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        width, bias = layer.embed_dim, layer.in_proj_bias is not None
        self.embed_dim, self.num_heads = width, layer.num_heads
        self.batch_first, self.dropout = layer.batch_first, layer.dropout
        self.query, self.key, self.value = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(width, width, bias=layer.out_proj.bias is not None)
        self.scores, self.mix = Matmul(), Matmul()
        self.load_state_dict(layer.state_dict())

    @staticmethod
    def fits(layer: nn.MultiheadAttention) -> bool:
        """Whether the layer can be replaced."""
        return layer._qkv_same_embed_dim and layer.bias_k is None and not layer.add_zero_attn

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        for kind in ("weight", "bias"):
            joint = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            if joint is not None:
                for name, part in zip(("query", "key", "value"), joint.chunk(3), strict=True):
                    state_dict[f"{prefix}{name}.{kind}"] = part
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention`'s, for batches.

        Args:
            query, key, value: `(tokens, n, width)`, or `(n, tokens, width)` with `batch_first`.
            key_padding_mask: bool `(n, keys)`, true for what nothing attends to, or added scores.
            attn_mask: bool or added scores, `(queries, keys)` or `(n * heads, queries, keys)`.
        """
        inputs = (query, key, value)
        if not self.batch_first:
            inputs = tuple(x.transpose(0, 1) for x in inputs)
        layers = (self.query, self.key, self.value)
        # (n, heads, tokens, width of a head)
        q, k, v = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in zip(layers, inputs, strict=True)
        )
        scores = self.scores(q / math.sqrt(q.shape[-1]), k.transpose(-2, -1))
        if attn_mask is not None:
            batched = attn_mask.ndim == 3
            scores = _masked(
                scores, attn_mask.unflatten(0, (len(scores), -1)) if batched else attn_mask
            )
        if key_padding_mask is not None:
            scores = _masked(scores, key_padding_mask[:, None, None, :])
        weights = nn.functional.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        mixed = self.out_proj(self.mix(weights, v).transpose(1, 2).flatten(2))
        return mixed if self.batch_first else mixed.transpose(0, 1), None


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(mask, -torch.inf)
    return scores + mask


_REPLACEMENTS: tuple[tuple[Any, Any], ...] = (
    (nn.ConvTranspose2d, DecomposedDeconv),
    (nn.MultiheadAttention, DecomposedAttention),
)


def expose(module: nn.Module) -> None:
    """Replace what can be replaced in a network, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            for hidden, shown in _REPLACEMENTS:
                # mmcv's class of the same name adds what PyTorch before 1.4 lacked, and no more.
                replaceable = type(child) is hidden or (
                    isinstance(child, hidden)
                    and type(child).__module__ == "mmcv.cnn.bricks.wrappers"
                )
                if replaceable and shown.fits(child):
                    setattr(parent, name, shown(child).train(child.training))

"""Swing convolution (GENIE, Jeon et al. 2023), off unless a recipe turns it on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..graph.execution import hooks


@contextlib.contextmanager
def swinging(module: nn.Module, generators: Sequence[Generator]) -> Iterator[None]:
    """Within the context, while gradients are recorded, each strided convolution sees its input,
    mirrored at the borders, moved by less than its stride, so that no pixel is always the one that
    is skipped.

    Args:
        module: the network.
        generators: of the shards that its images fall into, one after the other; each draws where
            its own are moved.
    """

    def swing(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not torch.is_grad_enabled():
            return None
        assert isinstance(layer, nn.Conv2d)
        x = inputs[0]
        down, across = (s - 1 for s in layer.stride)
        if down >= x.shape[2] or across >= x.shape[3]:
            return None
        padded = F.pad(x, (across, across, down, down), mode="reflect")
        moved = []
        for part, generator in zip(padded.chunk(len(generators)), generators, strict=True):
            offset = torch.rand(2, generator=generator)
            top, left = int(offset[0] * (2 * down + 1)), int(offset[1] * (2 * across + 1))
            moved.append(part[:, :, top : top + x.shape[2], left : left + x.shape[3]])
        return (moved[0] if len(moved) == 1 else torch.cat(moved), *inputs[1:])

    with hooks(
        layer.register_forward_pre_hook(swing)
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1
    ):
        yield

"""Blocks, attention and end layers of a classifier, found in its modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torchvision.ops import Conv2dNormActivation

from ..base import Boundary
from ..nn.decomposed import DecomposedAttention
from .attention import DecomposedSelfAttention

_HOLDING_BLOCKS = ("AnyStage", "RegStage", "Encoder", "Transformer", "ResStage")
"""Classes of modules that are no block but hold some, besides lists."""

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ATTENTION = (DecomposedAttention, DecomposedSelfAttention)


def blocks(module: nn.Module) -> list[str]:
    """Qualified names of the blocks of a network, in order; a layer that is in none is one of its
    own. Normalisation goes with what is before it."""
    return list(_walk(module, ""))


def _walk(module: nn.Module, name: str) -> Iterator[str]:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(child, _NORMS) or not any(True for _ in child.parameters()):
            continue
        holds = type(child) in _LISTS or type(child).__name__ in _HOLDING_BLOCKS
        # Convolution, BatchNorm and activation one by one are one block.
        if holds and not isinstance(child, Conv2dNormActivation) and not _is_conv_block(child):
            yield from _walk(child, path)
        else:
            yield path


def _is_conv_block(module: nn.Module) -> bool:
    """Whether a list is a convolution and what goes with it."""
    weighted = [child for child in module.children() if any(True for _ in child.parameters())]
    first, *others = weighted
    return isinstance(first, nn.Conv2d) and all(isinstance(part, _NORMS) for part in others)


def boundary(module: nn.Module) -> Boundary:
    """The convolution that sees the image, which all have first, and the last linear layers."""
    first = next(name for name, child in module.named_modules() if isinstance(child, nn.Conv2d))
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    within = {name.rpartition(".")[0] for name in attention(module)}
    heads = [name for name in linear if name.rpartition(".")[0] not in within]
    return Boundary((first,), tuple(_last_of(heads)))


def _last_of(heads: list[str]) -> list[str]:
    """The last layer; and one of the same rank before it, as networks distilled by tokens have."""
    last = heads[-1]
    pair = last.removesuffix("_dist")
    return [pair, last] if pair != last and pair in heads else [last]


def attention(module: nn.Module) -> list[str]:
    """The layers whose outputs are those of attention between tokens, `(n, tokens, channels)`."""
    layers = []
    for name, child in module.named_modules():
        if isinstance(child, _ATTENTION):
            last = "out_proj" if isinstance(child, DecomposedAttention) else "proj"
            layers.append(f"{name}.{last}")
    return layers


def features(module: nn.Module) -> list[str]:
    """The blocks before the head, whose outputs are maps or tokens."""
    last = boundary(module).last
    layers = []
    for name in blocks(module):
        holds = any(f"{head}.".startswith(f"{name}.") for head in last)
        # Layers between pooling and the head give a vector.
        if not holds and not isinstance(module.get_submodule(name), nn.Linear):
            layers.append(name)
    return layers

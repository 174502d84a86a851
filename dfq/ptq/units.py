"""What is reconstructed, and in which order: layers, blocks, or parts of blocks before the blocks.

PFCR (Progressive Fine-to-Coarse Reconstruction, Ding et al., arXiv 2412.14633) reconstructs
attention and MLP of a transformer's layers first, then what they make up, and so on, each time from
where the finer units ended. Here these are three stages over the network: the modules that blocks
are directly made of, which in a CNN are its layers; the blocks; and pairs of blocks of which one
takes what the other gives. Unlike the paper's finest units, modules come without the shortcut
around them, which the block adds: errors of the shortcut are seen from the second stage on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..graph.execution import calls_in_order, hooks, is_inside, last_layer_of_block
from ..models.base import Model

Unit = tuple[str, ...]
"""Qualified names of the modules that are reconstructed as one; several run one after another."""


def units_of(model: Model, order: Sequence[str], *, layers: bool) -> list[str]:
    """Names of the modules that are reconstructed, in the order in which they end: the blocks that
    hold quantized layers, and quantized layers outside any block; or all layers by themselves.

    Args:
        model: quantized.
        order: names of its quantized layers as they run.
        layers: each layer by itself.
    """
    if layers:
        return list(order)
    ended = last_layer_of_block(order, model.blocks())
    units: list[str] = []
    for layer in order:
        if layer in ended:
            units.append(ended[layer])
        elif not any(is_inside(layer, block) for block in ended.values()):
            units.append(layer)
    return units


def progressive_stages(model: Model, order: Sequence[str], image: Tensor) -> list[list[Unit]]:
    """PFCR's units, the finest stage first; a unit that is in a finer stage is in no coarser one,
    and a stage without units is left out.

    Args:
        model: quantized.
        order: names of its quantized layers as they run.
        image: `(1, 3, h, w)` in [0, 1], to see what runs when.
    """
    blocks = units_of(model, order, layers=False)
    children = {
        f"{block}.{name}": child
        for block in blocks
        for name, child in model.module.get_submodule(block).named_children()
    }
    calls = calls_in_order(children.items(), lambda: model.raw(image))
    fine = [part for block in blocks for part in _parts(block, children, order, calls)]
    stages: list[list[Unit]] = [
        [(part,) for part in fine],
        [(block,) for block in blocks if block not in fine],
        _pairs(model, blocks, image),
    ]
    return [stage for stage in stages if stage]


def _parts(
    block: str, children: Mapping[str, nn.Module], order: Sequence[str], calls: Counter[str]
) -> list[str]:
    """The children of a block with quantized layers in them, in the order in which they end; the
    block itself where it has one at most, or they are not all that its layers are in and run."""
    layers = [layer for layer in order if is_inside(layer, block)]
    # By the last of their layers.
    ended = last_layer_of_block(layers, [name for name in children if is_inside(name, block)])
    parts = [ended[layer] for layer in layers if layer in ended]
    whole = all(any(is_inside(layer, part) for part in parts) for layer in layers)
    return parts if len(parts) > 1 and whole and all(calls[part] for part in parts) else [block]


@torch.no_grad()
def _pairs(model: Model, blocks: Sequence[str], image: Tensor) -> list[Unit]:
    """Blocks two by two, where the second takes what the first gives as it is, and nothing else in
    the network looks at that."""
    modules = {name: model.module.get_submodule(name) for name in blocks}
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in blocks}
    made: dict[str, Any] = {}
    kept: dict[str, Tensor] = {}

    def after(name: str, args: Any, kwargs: Any, output: Any) -> None:
        calls[name].append((args, kwargs))
        made[name] = output
        if isinstance(output, Tensor):
            # What comes next may write into it.
            kept[name] = output.clone()

    with hooks(
        module.register_forward_hook(
            lambda _m, args, kwargs, output, name=name: after(name, args, kwargs, output),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ):
        expected = tree_leaves(model.raw(image))

    def follows(second: str, first: str) -> bool:
        once = len(calls[first]) == len(calls[second]) == 1
        if not once or first not in kept or second not in kept:
            return False
        args, kwargs = calls[second][0]
        if kwargs or len(args) != 1 or args[0] is not made[first]:
            return False
        draw = torch.Generator().manual_seed(0)
        output = kept[first]
        noise = torch.rand(output.shape, generator=draw).to(output)
        other = output + noise * (output.abs().amax() + 1)
        with hooks(
            modules[name].register_forward_hook(lambda _m, _i, _o, value=value: value)
            for name, value in ((first, other), (second, kept[second].clone()))
        ):
            outputs = tree_leaves(model.raw(image))
        return all(
            torch.equal(a, b) if isinstance(a, Tensor) else a == b
            for a, b in zip(outputs, expected, strict=True)
        )

    pairs: list[Unit] = []
    rest = list(blocks)
    while len(rest) > 1:
        first, second = rest[:2]
        if follows(second, first):
            pairs.append((first, second))
            del rest[0]
        del rest[0]
    return pairs

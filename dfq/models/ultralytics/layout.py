"""How the layers of an Ultralytics network are wired, and which of them play which part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from ultralytics.nn.modules import CBLinear, RepConv

from ..base import Boundary

IMAGE = -1
# Layers by index: a layer takes one output, or a list of several.
Inputs = int | tuple[int, ...]


def as_tuple(inputs: Inputs) -> tuple[int, ...]:
    """The layers that `inputs` names."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def gather(outputs: dict[int, Any], inputs: Inputs) -> Any:
    """What a layer takes: one output, or the list of several."""
    if isinstance(inputs, tuple):
        return [outputs[index] for index in inputs]
    return outputs[inputs]


def wiring(layers: nn.Sequential) -> list[Inputs]:
    """Whose outputs each layer takes, as absolute indices (the image is -1)."""

    def absolute(index: int, source: int) -> int:
        return source if source >= 0 else index + source

    return [
        absolute(index, layer.f)
        if isinstance(layer.f, int)
        else tuple(absolute(index, source) for source in layer.f)
        for index, layer in enumerate(layers)
    ]


def kept_outputs(inputs: Sequence[Inputs]) -> set[int]:
    """The layers whose outputs are needed again after the layer that follows them."""
    return {
        source
        for index, sources in enumerate(inputs)
        for source in as_tuple(sources)
        if source != index - 1
    }


def _convolutions(layer: nn.Module) -> Iterator[str]:
    for name, part in layer.named_modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            yield name


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def boundary(layers: nn.Sequential, inputs: list[Inputs], head_lists: Sequence[str]) -> Boundary:
    """The convolutions that see the image, and the last of each branch of the head."""
    # v9e sees the image twice, through a layer that hands it on unchanged.
    images = {IMAGE}
    first = []
    for index, layer in enumerate(layers):
        if images.isdisjoint(as_tuple(inputs[index])):
            continue
        names = list(_convolutions(layer))
        if not names:
            images.add(index)
        # RepConv is two convolutions side by side on one input.
        first += [
            _join(f"model.{index}", name)
            for name in names[: 2 if isinstance(layer, RepConv) else 1]
        ]
    last = []
    for name in head_lists:
        for level, branch in enumerate(getattr(layers[-1], name)):
            end = list(_convolutions(branch))[-1]
            last.append(_join(f"model.{len(layers) - 1}", name, str(level), end))
    return Boundary(tuple(first), tuple(last))


def features_and_blocks(layers: nn.Sequential) -> tuple[list[str], list[str]]:
    """Layers before the head that have weights and give one tensor; and those that give several
    (CBLinear) replaced by their convolutions."""
    features, blocks = [], []
    for index, layer in enumerate(list(layers)[:-1]):
        name = f"model.{index}"
        if next(layer.parameters(), None) is None:
            continue
        if isinstance(layer, CBLinear) or getattr(layer, "split", False):
            # It gives several tensors: its convolutions are the blocks.
            blocks += [_join(name, inner) for inner in _convolutions(layer)]
        else:
            features.append(name)
            blocks.append(name)
    return features, blocks

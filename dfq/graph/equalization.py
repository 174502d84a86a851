"""Cross-layer equalisation (Nagel et al., ICCV 2019, section 4.1): channels of one range, for free.

What a layer gives in a channel may be divided by any s > 0 if the next layer's weights for it are
multiplied by s, as long as f(x / s) = f(x) / s for all that is between them: so for nothing, ReLU
and leaky ReLU. With s = sqrt(r1 / r2), r1 and r2 the greatest magnitudes of the channel's weights
in the one and the other layer, both become sqrt(r1 r2). With SiLU it does not hold, and such
layers stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.base import Model
from .links import Link, links

SWEEPS = 50
"""Over all pairs, at most: layers in a row share the layers between them."""

SETTLED = 1e-4
"""A sweep that moves no channel by more than this part is the last."""

DEAD = 1e-5
"""Of the layer's largest range: channels with less in either layer say nothing, and their biases
would grow beyond all others if they were brought up."""


def equal_pairs(layer_links: dict[str, Link]) -> list[tuple[str, str]]:
    """(layer, next layer) wherever the outputs of the one go, rectified at most, into the other
    alone, and nothing else does."""
    pairs = []
    for name, link in layer_links.items():
        source = link.source
        if source is not None and layer_links[source[0]].consumers == {name}:
            pairs.append((source[0], name))
    return pairs


@torch.no_grad()
def equalize(model: Model) -> list[tuple[str, str]]:
    """Equalise the ranges of all pairs of layers of a network where that changes nothing, in place;
    returns the pairs.

    Args:
        model: float, BatchNorm folded; what folded BatchNorm remembers is kept in step.
    """
    layer_links = links(model)
    pairs = equal_pairs(layer_links)
    for _ in range(SWEEPS):
        most = 0.0
        for name, next_name in pairs:
            layer = model.module.get_submodule(name)
            next_layer = model.module.get_submodule(next_name)
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            assert isinstance(next_layer, nn.Conv2d | nn.Linear)
            scale = equal_scale(output_ranges(layer), input_ranges(next_layer))
            _rescale(layer, next_layer, scale)
            norm = layer_links[name].batchnorm
            if norm is not None:
                norm.factor /= scale
                norm.shift /= scale
            most = max(most, float((scale - 1).abs().max()))
        if most <= SETTLED:
            break
    return pairs


def output_ranges(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Greatest magnitude of the weights of each output channel, `(out,)`."""
    return layer.weight.detach().abs().flatten(1).amax(dim=1)


def _groups(layer: nn.Conv2d | nn.Linear) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def input_ranges(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Greatest magnitude of the weights that each input channel is multiplied by, `(in,)`."""
    groups, weight = _groups(layer), layer.weight.detach().abs()
    weight = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return weight.amax(dim=(1, 3)).flatten()


def equal_scale(first: Tensor, second: Tensor) -> Tensor:
    """What to divide each channel by, `(channels,)`, for ranges `first` and `second` to meet."""
    alive = (first > DEAD * first.max()) & (second > DEAD * second.max())
    return torch.where(alive, (first / second).sqrt(), torch.ones_like(first))


def _rescale(
    layer: nn.Conv2d | nn.Linear, next_layer: nn.Conv2d | nn.Linear, scale: Tensor
) -> None:
    layer.weight /= scale.view(-1, *[1] * (layer.weight.ndim - 1))
    if layer.bias is not None:
        layer.bias /= scale
    groups, rows = _groups(next_layer), len(next_layer.weight)
    by_row = scale.view(groups, -1).repeat_interleave(rows // groups, dim=0)
    next_layer.weight *= by_row.view(*by_row.shape, *[1] * (next_layer.weight.ndim - 2))

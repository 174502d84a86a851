"""Bias correction (Nagel et al., ICCV 2019, section 4.2): rounding errors of weights shift no mean.

With weights W rounded to W~, what a layer gives is off by eps * x, eps = W~ - W, and on the mean by
eps * E[x], which is taken off the bias. E[x] is known without any image where x comes of BatchNorm,
through ReLU or nothing: a channel is then normal with mean beta and standard deviation |gamma|,
clipped at zero. Elsewhere the mean of eps * x over the places of some images is taken itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..graph.execution import hooks
from ..graph.fold_batchnorm import FoldedBatchNorm
from ..graph.links import Link, links
from ..models.base import Model
from ..quantization.layers import QuantConv2d, QuantLinear
from ..quantization.traversal import quantized_layers


def rectified_mean(mean: Tensor, deviation: Tensor, slope: float) -> Tensor:
    """Mean of a normal variable that is multiplied by `slope` below zero; in any shape.

    E[max(x, 0)] = sigma phi(mu / sigma) + mu Phi(mu / sigma), and below zero it is what is left of
    mu.
    """
    ratio = mean / deviation.clamp_min(torch.finfo(mean.dtype).tiny)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    above = deviation * density + mean * torch.special.ndtr(ratio)
    return above + slope * (mean - above)


def known_mean(name: str, layer_links: dict[str, Link]) -> Tensor | None:
    """E[x] of each input channel of a layer, `(channels,)`, by the BatchNorm in front; None: there
    is none, or more than one rectifier behind it.

    Args:
        name: of the layer.
        layer_links: what `links` says of the network.
    """
    source = layer_links[name].source if name in layer_links else None
    if source is None or len(source[1]) > 1:
        return None
    norm = layer_links[source[0]].batchnorm
    if norm is None:
        return None
    return rectified_mean(*_normal(norm), slope=source[1][0] if source[1] else 1.0)


def _normal(norm: FoldedBatchNorm) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel that a folded BatchNorm gives."""
    return norm.shift, norm.factor.abs() * norm.var.sqrt()


@torch.no_grad()
def correct_biases(
    student: Model, teacher: Model, images: Tensor, *, batch_size: int = 8
) -> dict[str, bool]:
    """Take the mean of what rounding the weights adds to each layer's output off its bias, in
    place; layers without a bias stay as they are.

    Args:
        student: quantizers inserted, the scales of weights set.
        teacher: the float network it is a copy of, folded.
        images: uint8 `(n, 3, h, w)`, RGB, for layers whose E[x] is not known.
        batch_size: images of one forward pass.

    Returns:
        By name of the layers that were corrected: whether BatchNorm told E[x].
    """
    layer_links = links(teacher)
    corrected: dict[str, bool] = {}
    rest: dict[str, tuple[QuantConv2d | QuantLinear, Tensor]] = {}
    for name, layer in quantized_layers(student.module):
        if layer.bias is None:
            continue
        original = teacher.module.get_submodule(name)
        assert isinstance(original, nn.Conv2d | nn.Linear)
        error = layer.weight_quantizer(layer.weight) - original.weight
        mean = known_mean(name, layer_links)
        if mean is None:
            rest[name] = layer, error
            continue
        groups = layer.groups if isinstance(layer, QuantConv2d) else 1
        rows = mean.view(groups, 1, -1).expand(-1, len(error) // groups, -1).flatten(0, 1)
        layer.bias -= (error.flatten(2).sum(2) * rows if error.ndim > 2 else error * rows).sum(1)
        corrected[name] = True
    for name, shift in _mean_shifts(teacher, rest, images, batch_size).items():
        rest[name][0].bias.sub_(shift)
        corrected[name] = False
    return corrected


def _mean_shifts(
    teacher: Model,
    layers: dict[str, tuple[QuantConv2d | QuantLinear, Tensor]],
    images: Tensor,
    batch_size: int,
) -> dict[str, Tensor]:
    """Mean of eps * x over images and places, `(out,)`, of each layer that runs; the borders, where
    zeros are padded, are among the places.

    Args:
        layers: by name, and eps of each.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, inputs: tuple[Tensor, ...]) -> None:
        layer, error = layers[name]
        if isinstance(layer, QuantConv2d):
            output = layer._conv_forward(inputs[0], error, None).transpose(0, 1).flatten(1)
        else:
            output = nn.functional.linear(inputs[0], error).flatten(0, -2).mT
        sums[name] = sums.get(name, 0) + output.double().sum(1)
        counts[name] = counts.get(name, 0) + output.shape[1]

    def watch() -> Iterator[RemovableHandle]:
        for name in layers:
            yield teacher.module.get_submodule(name).register_forward_pre_hook(
                lambda _m, inputs, name=name: add(name, inputs)
            )

    if layers:
        with hooks(watch()):
            for batch in images.split(batch_size):
                teacher.raw(batch.to(teacher.device).float() / 255)
    return {name: (total / counts[name]).float() for name, total in sums.items() if counts[name]}

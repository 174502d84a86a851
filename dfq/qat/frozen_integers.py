"""Integer codes of weights that stay what they were rounded to, while their scales are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.base import Model
from ..quantization.layers import QuantConv2d, QuantLinear
from ..quantization.traversal import quantized_layers
from .settings import Distillation


def frozen_layers(student: Model, settings: Distillation) -> list[QuantConv2d | QuantLinear]:
    """The quantized layers whose integers stay what they were rounded to.

    With a `weight_lr` of 0 these are all of them but, with `train_last`, those that give the
    predictions and have 8 bits. How far those predictions are off is convex in such a layer's
    weights, it can make up for errors of the whole network before it, and to round 8 bits anew at
    every step costs next to nothing.
    """
    if settings.weight_lr != 0:
        return []
    last = set()
    if settings.train_last:
        last = {student.module.get_submodule(name) for name in student.boundary_layers().last}
    return [
        layer
        for _, layer in quantized_layers(student.module)
        if layer not in last or layer.weight_quantizer.bits < 8
    ]


class FrozenIntegers:
    """Freezes the integer codes of quantized weights while their scales are trained.

    What the layers' state dicts say of the weights is what they are at the time, and a state that
    is loaded brings its own integers.

    Args:
        layers: calibrated; their weights are rounded, or to be rounded to the nearest level.
    """

    def __init__(self, layers: Sequence[QuantConv2d | QuantLinear]) -> None:
        self._layers = list(layers)
        self._handles: list[Any] = []
        for layer in self._layers:
            _hold(layer)
            self._handles += [
                layer.register_state_dict_pre_hook(lambda module, *_: _settle(module)),
                layer.register_load_state_dict_post_hook(lambda module, _: _hold(module)),
            ]

    def levels(self) -> list[Tensor]:
        """The frozen integers of each layer, float32 of the shape of its weight; not copies."""
        return [
            frozen
            for layer in self._layers
            if (frozen := layer.weight_quantizer.levels) is not None
        ]

    def unfreeze(self) -> None:
        """Leave the weights on the grid as it is now, to be rounded as any others."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            _settle(layer)
            layer.weight_quantizer.unfreeze()


def _hold(layer: QuantConv2d | QuantLinear) -> None:
    layer.weight_quantizer.freeze_integers(layer.weight)


@torch.no_grad()
def _settle(layer: QuantConv2d | QuantLinear) -> None:
    layer.weight.copy_(layer.weight_quantizer(layer.weight))

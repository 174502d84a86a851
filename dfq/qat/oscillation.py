"""Against weights that jump between two levels for ever (Nagel et al., ICML 2022, 2203.11086).

Below five bits many weights end near the threshold between two levels: the straight-through
gradient pushes each back as soon as it has crossed, and where it stops is chance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization.quantizers import Quantizer
from ..quantization.traversal import quantized_layers

MOMENTUM = 0.01
"""Of the running averages of jumps and levels: the paper's."""

FIRST_THRESHOLD = 4.0
"""Freezing begins at so many times the threshold and comes down to it by a cosine."""


class _Weight:
    """One weight tensor, and what its levels did so far."""

    def __init__(self, weight: nn.Parameter, quantizer: Quantizer, *, tracked: bool) -> None:
        self.weight, self.quantizer = weight, quantizer
        self.level = self.mean = self.frequency = self.direction = torch.empty(0)
        self.frozen = torch.empty(0, dtype=torch.bool)
        if tracked:
            self.level = self.levels()
            self.mean = self.level.clone()
            self.frequency = torch.zeros_like(self.level)
            self.direction = torch.zeros_like(self.level)
            self.frozen = torch.zeros_like(self.level, dtype=torch.bool)

    def scale(self) -> Tensor:
        return self.quantizer.scale_of(self.weight)

    def levels(self) -> Tensor:
        """The integer each value is rounded to, as floats."""
        steps = self.weight.detach() / self.scale()
        return steps.round_().clamp_(*self.quantizer.limits_of(steps))

    def tensors(self) -> dict[str, Tensor]:
        names = ("level", "mean", "frequency", "direction", "frozen")
        return {name: getattr(self, name) for name in names}


class Oscillation:
    """Damps and freezes oscillating weights of a student.

    Args:
        module: the calibrated student; the weights of quantized layers are treated.
        dampen: factor of the regularizer sum (w - w_hat)^2 over the values inside the grid, which
            rises from zero to this over the training; 0 for none.
        freeze: share of the steps in which a value jumps back and forth, above which it is frozen
            to the level it was on most; 0 for none. At the start four times as much, by a cosine.
    """

    def __init__(self, module: nn.Module, dampen: float, freeze: float) -> None:
        self.dampen, self.freeze = dampen, freeze
        self.weights = (
            [
                _Weight(layer.weight, layer.weight_quantizer, tracked=freeze > 0)
                for _, layer in quantized_layers(module)
            ]
            if dampen > 0 or freeze > 0
            else []
        )

    @torch.no_grad()
    def pull(self, progress: float) -> None:
        """Add the regularizer's gradient to that of the weights; steps get none of it.

        Args:
            progress: share of the training that is done, 0 to 1.
        """
        factor = self.dampen * 0.5 * (1 - math.cos(math.pi * progress))
        if factor == 0:
            return
        for one in self.weights:
            if one.weight.grad is None:
                continue
            scale = one.scale()
            least, largest = one.quantizer.limits_of(one.weight)
            # Clipped values are at no level's edge.
            off = one.weight.clamp(least * scale, largest * scale) - one.levels() * scale
            one.weight.grad.add_(off, alpha=2 * factor)

    @torch.no_grad()
    def hold(self, progress: float) -> None:
        """After a step: count jumps, freeze what jumps too often, keep what is frozen.

        Args:
            progress: share of the training that is done, 0 to 1.
        """
        if self.freeze == 0:
            return
        fall = 0.5 * (1 + math.cos(math.pi * progress))
        threshold = self.freeze * (1 + (FIRST_THRESHOLD - 1) * fall)
        for one in self.weights:
            level = one.levels()
            change = level - one.level
            jumped = change != 0
            # A jump against the direction of the last one, however long ago that was.
            back = jumped & (change.sign() == -one.direction)
            one.frequency.lerp_(back.to(one.frequency.dtype), MOMENTUM)
            one.direction = torch.where(jumped, change.sign(), one.direction)
            one.mean.lerp_(level, MOMENTUM)
            new = (one.frequency > threshold) & ~one.frozen
            one.level = torch.where(
                one.frozen, one.level, torch.where(new, one.mean.round(), level)
            )
            one.frozen |= new
            # The level is frozen, not the value: the step it is a multiple of goes on learning.
            one.weight.copy_(torch.where(one.frozen, one.level * one.scale(), one.weight))

    def frozen_share(self) -> float:
        """Share of the values that are frozen, in [0, 1]."""
        count = sum(one.frozen.numel() for one in self.weights)
        return sum(int(one.frozen.sum()) for one in self.weights) / count if count else 0.0

    def state(self) -> list[dict[str, Any]]:
        """What was counted, for a checkpoint."""
        return [one.tensors() for one in self.weights] if self.freeze > 0 else []

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Take over what a checkpoint holds."""
        for one, saved in zip(self.weights, state, strict=False):
            for name, tensor in saved.items():
                setattr(one, name, tensor)

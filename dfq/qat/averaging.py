"""Weights that are kept at the end: an exponential moving average, or the best checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Exponential moving average of parameters, with the decay ramped up over the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.shadow = [p.detach().clone() for p in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages with the module's own values."""
        for parameter, average in zip(self.parameters, self.shadow, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(current)


class BestCheckpoint:
    """The parameters with the highest score so far; the first of equals.

    Args:
        parameters: the very ones that are trained.

    Attributes:
        epoch, score: of those kept; 0 and minus infinity where none are.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.epoch, self.score = 0, -math.inf
        self.kept: list[Tensor] = []

    def offer(self, epoch: int, score: float) -> None:
        """Keep the parameters as they are now if their score is the highest."""
        if score > self.score:
            self.epoch, self.score = epoch, score
            self.kept = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def put_back(self) -> bool:
        """Give the parameters the values that were kept; false where none were."""
        for parameter, kept in zip(self.parameters, self.kept, strict=False):
            parameter.copy_(kept)
        return bool(self.kept)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"epoch": self.epoch, "score": self.score, "kept": self.kept}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Take over what a checkpoint holds; None: nothing was kept."""
        if state is not None:
            self.epoch, self.score, self.kept = state["epoch"], state["score"], state["kept"]

"""What training does with a student's parameters beside stepping them: rates, bounds, averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization.layers import QuantConv2d, QuantLinear
from ..quantization.quantizers import Quantizer
from ..quantization.traversal import quantized_layers
from .settings import Distillation


def require_gradients(
    student: nn.Module, frozen: Sequence[QuantConv2d | QuantLinear], *, zero_points: bool = False
) -> None:
    """Mark what training moves: every parameter but the weights of the `frozen` layers, the zero
    points of weights and those of symmetric quantizers; of others as `zero_points` says."""
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for module in student.modules():
        if isinstance(module, Quantizer):
            module.zero_point.requires_grad_(module.asymmetric and zero_points)
    for _, layer in quantized_layers(student):
        layer.weight_quantizer.zero_point.requires_grad_(False)
    for layer in frozen:
        layer.weight.requires_grad_(False)


def parameter_groups(student: nn.Module, settings: Distillation) -> list[dict[str, Any]]:
    """What requires gradients: step sizes; zero points, by the width of their grid; quantized
    weights, where they have a rate of their own; and all others."""
    quantizers = [m for m in student.modules() if isinstance(m, Quantizer)]
    scales = {quantizer.log_scale for quantizer in quantizers}
    # A zero point is counted in levels, of which a grid has ten or hundreds.
    widths = {q.zero_point: q.bounds[1] - q.bounds[0] for q in quantizers}
    weights: set[nn.Parameter] = set()
    if settings.weight_lr:
        weights = {layer.weight for _, layer in quantized_layers(student)}
    trained = [p for p in student.parameters() if p.requires_grad]
    apart = {*scales, *widths, *weights}
    groups = (
        (settings.lr, [p for p in trained if p not in apart]),
        (settings.scale_lr, [p for p in trained if p in scales]),
        (settings.weight_lr, [p for p in trained if p in weights]),
        *(
            (settings.zero_lr * width, [p for p in trained if widths.get(p) == width])
            for width in sorted(set(widths.values()))
        ),
    )
    return [{"params": found, "lr": rate, "peak": rate} for rate, found in groups if found and rate]


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at a step of so many: rising over the share `warmup` of them, then a
    cosine to zero."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class WeightSteps:
    """Makes the rate of a quantized weight mean quantization steps of its own channel.

    Folding BatchNorm spreads the channels of one layer, and the layers, over orders of magnitude: a
    rate that rounds the weights of one channel anew at every step leaves those of another where
    they were, and what suits 4 bits is sixteen times too much for 8. Adam's step does not depend on
    the size of the gradient, so it only has to be multiplied by the size of the quantization step.

    Args:
        module: the calibrated student.
        enabled: otherwise rates are in units of the weights, and this does nothing.
    """

    def __init__(self, module: nn.Module, enabled: bool) -> None:
        layers = [layer for _, layer in quantized_layers(module)] if enabled else []
        self.weights = [layer.weight for layer in layers]
        self.sizes = []
        for layer in layers:
            scale = layer.weight_quantizer.scale_of(layer.weight)
            self.sizes.append(torch.empty_like(layer.weight).copy_(scale))
        self.before = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def remember(self) -> None:
        """Note the weights before a step of the optimizer."""
        if self.weights:
            torch._foreach_copy_(self.before, self.weights)

    @torch.no_grad()
    def rescale(self) -> None:
        """Turn the change since then from units into quantization steps."""
        if self.weights:
            torch._foreach_lerp_(self.before, self.weights, self.sizes)
            torch._foreach_copy_(self.weights, self.before)

    def state(self) -> list[Tensor]:
        """The sizes of the steps, for a checkpoint: they are those of the calibrated start."""
        return self.sizes

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Take the sizes from a checkpoint."""
        for size, saved in zip(self.sizes, state, strict=True):
            size.copy_(saved)


class Leash:
    """Keeps each quantized weight within so many of its quantization steps of where it began, and
    zero points on their grids.

    A set of a few hundred synthetic images cannot say how the weights of a good network should
    move, only how they should be rounded: half a step is enough to choose between the two nearest
    levels (the space AdaRound searches), and what is bounded in steps tightens with the bit width
    by itself. Without a bound, training fits the set and drifts from what real images need.

    The forward pass takes a zero point beyond an end of its grid for that end; let go, it would
    have a long way back.

    Args:
        module: the calibrated student, its weights the float ones or rounded already.
        steps: the bound of weights, in steps of the calibrated grid; 0 for none.
    """

    def __init__(self, module: nn.Module, steps: float) -> None:
        self.weights: list[nn.Parameter] = []
        self.low: list[Tensor] = []
        self.high: list[Tensor] = []
        self.quantizers = [
            m for m in module.modules() if isinstance(m, Quantizer) and m.zero_point.requires_grad
        ]
        if steps == 0:
            return
        for _, layer in quantized_layers(module):
            weight = layer.weight.detach()
            reach = steps * layer.weight_quantizer.scale_of(weight)
            self.weights.append(layer.weight)
            self.low.append(weight - reach)
            self.high.append(weight + reach)

    @torch.no_grad()
    def pull(self) -> None:
        """Put what went too far back on the bound."""
        for weight, low, high in zip(self.weights, self.low, self.high, strict=True):
            torch.clamp(weight, low, high, out=weight)
        for quantizer in self.quantizers:
            quantizer.zero_point.clamp_(*quantizer.bounds)

    def state(self) -> list[Tensor]:
        """The bounds, for a checkpoint."""
        return [*self.low, *self.high]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Take the bounds from a checkpoint: the student it came with is no longer float."""
        for bound, saved in zip(self.state(), state, strict=True):
            bound.copy_(saved)

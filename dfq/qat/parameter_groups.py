"""Which parameters of a student are trained, at which rates, and the bounds of zero points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

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
            module.log_scale.requires_grad_(module.searched)
            module.zero_point.requires_grad_(module.searched and module.asymmetric and zero_points)
    for _, layer in quantized_layers(student):
        layer.weight_quantizer.zero_point.requires_grad_(False)
    for layer in frozen:
        layer.weight.requires_grad_(False)


def parameter_groups(student: nn.Module, settings: Distillation) -> list[dict[str, Any]]:
    """What requires gradients: step sizes; zero points, by the width of their grid; and all
    others."""
    quantizers = [m for m in student.modules() if isinstance(m, Quantizer)]
    scales = {quantizer.log_scale for quantizer in quantizers}
    # A zero point is counted in levels, of which a grid has ten or hundreds.
    widths = {q.zero_point: q.bounds[1] - q.bounds[0] for q in quantizers}
    trained = [p for p in student.parameters() if p.requires_grad]
    apart = {*scales, *widths}
    groups = (
        (settings.lr, [p for p in trained if p not in apart]),
        (settings.scale_lr, [p for p in trained if p in scales]),
        *(
            (settings.zero_lr * width, [p for p in trained if widths.get(p) == width])
            for width in sorted(set(widths.values()))
        ),
    )
    return [
        {"params": parameters, "lr": rate, "peak": rate}
        for rate, parameters in groups
        if parameters and rate
    ]


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at a step of so many: rising over the share `warmup` of them, then a
    cosine to zero."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def trained_zero_points(student: nn.Module) -> list[Quantizer]:
    """The quantizers whose zero point requires a gradient."""
    return [m for m in student.modules() if isinstance(m, Quantizer) and m.zero_point.requires_grad]


@torch.no_grad()
def keep_zero_points_on_grids(quantizers: Sequence[Quantizer]) -> None:
    """Clamp zero points to the ends of their grids.

    The forward pass takes a zero point beyond an end of its grid for that end; let go, it would
    have a long way back.
    """
    for quantizer in quantizers:
        quantizer.zero_point.clamp_(*quantizer.bounds)

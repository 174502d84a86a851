"""Weights of a frozen network that are brought to half precision once, and not in every pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Computes = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@contextlib.contextmanager
def cast_once(module: nn.Module) -> Iterator[None]:
    """Within the context convolutions and linear layers under autocast take weights in bfloat16
    that were made at its start.

    Autocast keeps what it casts where a weight has a gradient, and casts that of a frozen layer in
    every pass: two operations a layer, for the same values.

    Args:
        module: in which no such weight has a gradient, or changes.
    """
    replaced = []
    for layer in module.modules():
        if "forward" in vars(layer) or any(p.requires_grad for p in layer.parameters()):
            continue
        # Not subclasses, which may compute something else.
        if type(layer) is nn.Conv2d:
            computes: Computes = layer._conv_forward
        elif type(layer) is nn.Linear:
            computes = F.linear
        else:
            continue
        bias = None if layer.bias is None else layer.bias.to(torch.bfloat16)
        half = layer.weight.to(torch.bfloat16), bias
        # A hook can follow what a module computes, not take its place.
        layer.forward = functools.partial(_forward, computes, half, layer.forward)
        replaced.append(layer)
    try:
        yield
    finally:
        for layer in replaced:
            del layer.forward


def _forward(
    computes: Computes,
    half: tuple[Tensor, Tensor | None],
    plain: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Tensor:
    return computes(x, *half) if torch.is_autocast_enabled(x.device.type) else plain(x)

"""Squared error of a block's outputs: AdaRound's and QDrop's objective, and BRECQ's plain one."""

from __future__ import annotations

import torch
from torch import Tensor

from .step import Step


def channel_axis(output: Tensor) -> int:
    """The axis that errors are summed over: channels of feature maps `(n, c, h, w)`, the last one
    of tokens `(n, tokens, c)` and vectors `(n, c)`."""
    return 1 if output.ndim == 4 else output.ndim - 1


def squared_error(
    output: Tensor, expected: Tensor, unit: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Squared differences summed over the channels and averaged over everything else (`lp_loss` of
    BRECQ's and QDrop's code, p = 2), in units of `unit`; each weighted where there is a weight."""
    square = (output - expected).square()
    if weight is not None:
        square = square * weight
    return square.sum(channel_axis(output)).mean() / unit


def block_error(step: Step) -> Tensor:
    """The mean of `squared_error` over the block's outputs."""
    errors = [
        squared_error(output, expected, unit)
        for output, expected, unit in zip(step.outputs, step.float_outputs, step.unit, strict=True)
    ]
    return torch.stack(errors).mean()

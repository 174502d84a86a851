"""MGRQ (Yang et al., 2024): a block's outputs, those of its layers and the predictions together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_error import block_error, channel_axis
from .prediction_difference import predictions_apart
from .step import Step

GLOBAL, LOCAL = 1.0, 1.0
"""Weights of the supervision from outside the block and from within it, in its fusion."""


def distribution_distance(output: Tensor, expected: Tensor) -> Tensor:
    """KL between the softmaxes over the channels of a layer's output and the float layer's, each in
    units of the float one's standard deviation, averaged over the places."""
    axis = channel_axis(output)
    spread = expected.std() + 1e-6
    ours = F.log_softmax(output / spread, dim=axis)
    theirs = F.log_softmax(expected / spread, dim=axis)
    return (theirs.exp() * (theirs - ours)).sum(axis).mean()


def mixed_granularity(step: Step) -> Tensor:
    """Block reconstruction + extra-block global supervision (the predictions' divergence) +
    intra-block local supervision (the distributions of the outputs of its layers)."""
    local = [distribution_distance(output, expected) for output, expected in step.layers()]
    total = block_error(step) + GLOBAL * predictions_apart(step, 1.0)
    return total + LOCAL * torch.stack(local).mean() if local else total

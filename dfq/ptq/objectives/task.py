"""The network's own training loss on the labels of the set, beside the block's error."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_error import block_error
from .step import Step


def task_guided(step: Step) -> Tensor:
    """Block error, and the task's loss of the network whose blocks up to this one are quantized, in
    units of the float network's own loss."""
    targets = step.targets()
    loss = _summed(step.model.task_loss(step.predictions(), targets, step.image_shape))
    with torch.no_grad():
        float_loss = _summed(
            step.model.task_loss(step.float_predictions(), targets, step.image_shape)
        )
    return block_error(step) + loss / float_loss.clamp_min(1e-6)


def _summed(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([term.float() for term in terms.values()]).sum()

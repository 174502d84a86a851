"""BRECQ (Li et al., ICLR 2021): squared errors, each as bad as the predictions feel it."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_error import squared_error
from .step import Step


def fisher_error(step: Step) -> Tensor:
    """Eq. 10 with the diagonal of the Fisher information in the place of the Hessian, scaled to a
    mean of 1 so that it weighs against the rounding's regulariser as the plain error does."""
    errors = [
        squared_error(output, expected, unit, weight)
        for output, expected, unit, weight in zip(
            step.outputs, step.float_outputs, step.unit, step.fisher(), strict=True
        )
    ]
    return torch.stack(errors).mean()

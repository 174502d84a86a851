"""APQ-ViT (Ding et al., ACM MM 2022), Bottom-elimination Blockwise Calibration: squared errors of a
block, each as bad as the predictions feel it, the small ones left out."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_error import squared_error
from .step import Step

BOTTOM = 0.5
"""Share of the errors that counts as small. What cannot be helped at so few bits is not to decide
about what can. The paper published neither code nor, where we could read of it, this share."""


def bottom_elimination(step: Step) -> Tensor:
    """The mean over the block's outputs of `squared_error`, weighted by the diagonal of the Fisher
    information, of the `1 - BOTTOM` largest absolute differences of each image alone."""
    errors = []
    for output, expected, unit, weight in zip(
        step.outputs, step.float_outputs, step.unit, step.fisher(), strict=True
    ):
        size = (output.detach() - expected).abs().flatten(1)
        # Of equal errors at the limit all count.
        least = size.kthvalue(1 + int(BOTTOM * size.shape[1]), dim=1, keepdim=True).values
        counts = (size >= least).view_as(output).to(weight.dtype)
        errors.append(squared_error(output, expected, unit, weight * counts))
    return torch.stack(errors).mean()

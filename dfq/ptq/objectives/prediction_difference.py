"""PD-Quant (Liu et al., CVPR 2023): how far the predictions are from the float network's."""

from __future__ import annotations

from torch import Tensor

from ...models.divergence import prediction_divergence
from .block_error import block_error
from .step import Step

LAMBDA, TEMPERATURE = 0.1, 4.0
"""lambda_r and T of the public code's defaults."""


def predictions_apart(step: Step, temperature: float) -> Tensor:
    """KL(float predictions || predictions of the partly quantized network), an image, both softened
    by T; not multiplied by T^2, as in the paper."""
    pairs = step.model.distillation_pairs(step.predictions(), step.float_predictions())
    divergence = prediction_divergence(pairs, step.images, temperature=temperature)
    return divergence / temperature**2


def prediction_difference(step: Step) -> Tensor:
    """Eq. 8: the prediction difference and the regulariser, in the public code's scaling:
    KL / lambda_r + |A_l - A~_l|^2. Activations are dropped for the regulariser alone."""
    return block_error(step) + predictions_apart(step, TEMPERATURE) / LAMBDA

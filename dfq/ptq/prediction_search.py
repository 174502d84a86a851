"""Scales of activations by what each does to the predictions, all the rest in float.

PD-Quant (Liu et al., CVPR 2023) finds the scale of an activation where the predictions of the
network with this activation alone quantized have the least KL divergence from those of the float
network. Mean squared error and cosine of the predictions are measured in its stead where they are
asked for. Its published code has no such search: there scales start from least errors of the
activations to the power 2.4, and are trained on that divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.base import Model
from ..models.divergence import summed_divergence
from ..quantization.range_search import Distance, cosine_distance, mean_square
from ..quantization.traversal import activation_quantizers
from .activation_refinement import candidates
from .grid_walk import PredictionDistance, walking

MOST_BITS = 8
"""Of activations whose grids are looked for. With more there are levels for all values."""

FACTORS = tuple(1.25**power for power in range(-3, 6))
"""Of the step size with the least squared error: those that are tried, 0.5 to 3. Each costs a pass
over the images from the quantizer on, so they are fewer than the 80 of a local search."""

HOPELESS = 10.0
"""Grids with so many times the squared error of the best one are not tried."""


def _values(model: Model, ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """All that the predictions of both hold where they are compared, `(1, n)` each."""
    pairs = model.distillation_pairs(ours, theirs)
    return (
        torch.cat([pair.student.flatten() for pair in pairs])[None],
        torch.cat([pair.teacher.flatten() for pair in pairs])[None],
    )


def _plain(measure: Distance, model: Model, ours: Any, theirs: Any) -> Tensor:
    return measure(*_values(model, ours, theirs))[0]


METRICS: dict[str, Callable[..., Tensor]] = {
    "pd": summed_divergence,
    "mse-output": partial(_plain, mean_square),
    "cosine-output": partial(_plain, cosine_distance),
}
"""By how they are called in a recipe, of a model and the raw predictions of two networks of its
kind for a batch: how far the first are from the second. pd: over the distributions that the family
says there are; the others: over the numbers that these are made of, all in one."""


def prediction_distance(model: Model, metric: str) -> PredictionDistance:
    """How far raw predictions are from each other by a key of `METRICS`."""
    return partial(METRICS[metric], model)


@torch.no_grad()
def search_grids(
    student: Model,
    teacher: Model,
    images: Tensor,
    metric: str,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Give each quantizer of activations the grid with which, all others and the weights in float,
    the predictions are closest to the float network's.

    Args:
        student: quantizers inserted and calibrated by least squares, weights still those of the
            teacher; scales and zero points of its quantizers of activations are changed in place.
        teacher: the float network it is a copy of, folded.
        images: uint8 `(n, 3, h, w)`, RGB.
        metric: a key of `METRICS`.
        batch_size: images of one forward pass.
        progress: called with quantizers done and quantizers in all.
    """
    quantizers = {
        name: quantizer
        for name, quantizer in activation_quantizers(student.module)
        if quantizer.bits <= MOST_BITS and quantizer.searched
    }
    batches = (images.to(student.device).float() / 255).split(batch_size)
    tried = partial(candidates, factors=FACTORS, hopeless=HOPELESS)
    apart = prediction_distance(student, metric)
    with walking(student, teacher, batches, quantizers, apart) as walk:
        walk.move(tried, stay_on=False, progress=progress)

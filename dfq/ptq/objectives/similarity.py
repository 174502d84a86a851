"""SPQ: similarities within a block's outputs are those within the float network's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .prediction_difference import predictions_apart
from .step import Step

BETA = 1000.0
"""Weight of the similarities against the distillation term."""

MOST_PLACES = 400
"""Side of a spatial Gram matrix at most: finer maps are averaged down to so many places."""


def gram(features: Tensor) -> Tensor:
    """Gram matrix of the rows of `(..., rows, values)`, each row of the result of length 1: `(...,
    rows, rows)`."""
    return F.normalize(features @ features.mT, dim=-1)


def batch_similarity(output: Tensor) -> Tensor:
    """`(b, b)`: of the images (or patches, proposals) of the batch."""
    return gram(output.flatten(1))


def channel_similarity(output: Tensor) -> Tensor:
    """`(b, c, c)`: of the channels of each image."""
    return gram(_by_channel(output))


def spatial_similarity(output: Tensor) -> Tensor:
    """`(b, hw, hw)`: of the places of each image."""
    if output.ndim == 4 and output.shape[2] * output.shape[3] > MOST_PLACES:
        ratio = (MOST_PLACES / (output.shape[2] * output.shape[3])) ** 0.5
        size = [max(1, int(side * ratio)) for side in output.shape[2:]]
        output = F.adaptive_avg_pool2d(output, size)
    return gram(_by_channel(output).mT)


def _by_channel(output: Tensor) -> Tensor:
    """`(b, c, places)` of feature maps `(b, c, h, w)`, tokens `(b, tokens, c)` or vectors."""
    if output.ndim == 4:
        return output.flatten(2)
    if output.ndim == 2:
        return output[:, :, None]
    return output.flatten(1, -2).mT


def similarity_distance(output: Tensor, expected: Tensor) -> Tensor:
    """||Z_F - Z_Q||^2 / Gamma for spatial and channel similarities, Gamma the number of entries,
    averaged over the images: the paper's default."""
    terms = [
        (similarity(output) - similarity(expected)).square().mean()
        for similarity in (spatial_similarity, channel_similarity)
    ]
    return torch.stack(terms).sum()


def similarity_preserving(step: Step) -> Tensor:
    """L_KD + beta * the distances of similarities, over the block's outputs."""
    distances = [
        similarity_distance(output, expected)
        for output, expected in zip(step.outputs, step.float_outputs, strict=True)
    ]
    return predictions_apart(step, 1.0) + BETA * torch.stack(distances).sum()

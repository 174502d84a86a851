"""Priors on natural images: total variation."""

from __future__ import annotations

import torch
from torch import Tensor


def total_variation(images: Tensor) -> Tensor:
    """L2 norms of the neighbour differences in four directions, over the whole batch, summed.

    Args:
        images: `(n, 3, h, w)`.

    Returns:
        A scalar; it grows with the square root of the number of pixels in the batch.
    """
    x = images
    differences = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return torch.stack([torch.linalg.vector_norm(d) for d in differences]).sum()

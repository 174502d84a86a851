"""Priors on natural images: total variation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def squared_variation(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared neighbour difference, and the direction in which it grows.

    The gradient of the sum of squared differences to the eight neighbours is a Laplacian, which
    needs no graph and a seventh of the time of `total_variation` and its backward pass. Its
    direction, image by image, is that of the norm's gradient but for the weighting of the four
    directions against each other.

    Args:
        images: `(n, 3, h, w)`.

    Returns:
        A scalar, the sum over the four directions of squared differences, over the number of
        pixels; and the gradient `(n, 3, h, w)` of half the sum of squared differences.
    """
    padded = F.pad(images, (1, 1, 1, 1))
    rows = padded[:, :, :-2] + padded[:, :, 1:-1]
    rows += padded[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1]
    around += rows[..., 2:]
    height, width = images.shape[2:]
    down = torch.full((height, 1), 3.0, device=images.device)
    across = torch.full((1, width), 3.0, device=images.device)
    # Fewer neighbours at the border; a side of one pixel has none.
    down[0] -= 1
    down[-1] -= 1
    across[:, 0] -= 1
    across[:, -1] -= 1
    gradient = torch.addcmul(around, images, down * across, value=-1).neg_()
    # For a quadratic form, the value is half the inner product with the gradient.
    inner = torch.dot(images.reshape(-1), gradient.reshape(-1))
    return inner / images.numel(), gradient

"""Priors on natural images: total variation, and the norm of an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.loader import call, usable


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


def image_norm(images: Tensor) -> Tensor:
    """L2 norm over the values of an image, the mean over the images.

    Args:
        images: `(n, 3, h, w)`.

    Returns:
        A scalar; it grows with the square root of the number of pixels in an image.
    """
    return torch.linalg.vector_norm(images, dim=(1, 2, 3)).mean()


def squared_variation(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared neighbour difference, and the direction in which it grows.

    The gradient of the sum of squared differences to the eight neighbours is a Laplacian, which
    needs no graph and a seventh of the time of `total_variation` and its backward pass. Its
    direction, image by image, is that of the norm's gradient but for the weighting of the four
    directions against each other.

    Args:
        images: float32 `(n, 3, h, w)`.

    Returns:
        A scalar, the sum over the four directions of squared differences, over the number of
        pixels; the gradient `(n, 3, h, w)` of half the sum of squared differences; and that
        gradient's norm in each image, `(n,)`.
    """
    if images.dtype == torch.float32 and images.is_contiguous() and usable(images):
        gradient = torch.empty_like(images)
        count, channels, height, width = images.shape
        sums = torch.empty(count, 2, dtype=torch.float64)
        line = images.new_empty(width + 2)
        sizes = (count, channels * height, height, width)
        call("variation", images.dtype, (images, gradient, sums, line), *sizes)
        norms, inner = sums[:, 0].sqrt().float(), sums[:, 1].sum().float()
    else:
        gradient = _laplacian(images)
        norms = torch.linalg.vector_norm(gradient, dim=(1, 2, 3))
        inner = torch.dot(images.reshape(-1), gradient.reshape(-1))
    # For a quadratic form, the value is half the inner product with the gradient.
    return inner / images.numel(), gradient, norms


def _laplacian(images: Tensor) -> Tensor:
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
    return torch.addcmul(around, images, down * across, value=-1).neg_()

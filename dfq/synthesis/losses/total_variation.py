"""Priors on natural images: total variation, and the norm of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.loader import fused_pixels, usable_planes
from ...kernels.operations import OPERATIONS
from ...kernels.plain import plain_variation


def batch_norms(values: Tensor, shards: int) -> Tensor:
    """L2 norms of `(shards * n, c, h, w)` over each shard: a scalar for one, else `(shards,)`."""
    if shards == 1:
        return torch.linalg.vector_norm(values)
    return torch.linalg.vector_norm(values.unflatten(0, (shards, -1)), dim=(1, 2, 3, 4))


def total_variation(images: Tensor, shards: int = 1) -> Tensor:
    """L2 norms of the neighbour differences in four directions, over the whole batch, summed.

    Args:
        images: `(shards * n, 3, h, w)`, one batch after the other.

    Returns:
        A scalar for one batch, else `(shards,)`; it grows with the square root of the number of
        pixels in the batch.
    """
    x = images
    differences = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return torch.stack([batch_norms(d, shards) for d in differences]).sum(0)


def image_norm(images: Tensor, shards: int = 1) -> Tensor:
    """L2 norm over the values of an image, the mean over the images.

    Args:
        images: `(shards * n, 3, h, w)`, one batch after the other.

    Returns:
        A scalar for one batch, else `(shards,)`; it grows with the square root of the number of
        pixels in an image.
    """
    norms = torch.linalg.vector_norm(images, dim=(1, 2, 3))
    return norms.mean() if shards == 1 else norms.unflatten(0, (shards, -1)).mean(1)


def squared_variation(images: Tensor, shards: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared neighbour difference, and the direction in which it grows.

    The gradient of the sum of squared differences to the eight neighbours is a Laplacian, which
    needs no graph and a seventh of the time of `total_variation` and its backward pass. Its
    direction, image by image, is that of the norm's gradient but for the weighting of the four
    directions against each other.

    Args:
        images: float32 `(n, 3, h, w)`, of `shards` batches one after the other.

    Returns:
        A scalar for one batch, else `(shards,)`: the sum over the four directions of squared
        differences, over the number of pixels; the gradient `(n, 3, h, w)` of half the sum of
        squared differences; and that gradient's norm in each image, `(n,)`.
    """
    kernels = fused_pixels(images.device)
    if usable_planes(images):
        gradient = torch.empty_like(images)
        sums = torch.empty(len(images), 2, dtype=torch.float64)
        OPERATIONS["variation"](images, gradient, sums)
        norms, inner = sums[:, 0].sqrt().float(), sums[:, 1].view(shards, -1).sum(1).float()
    elif kernels is not None and images.dtype == torch.float32 and images.is_contiguous():
        gradient, both = kernels.variation(images)
        norms, inner = both[:, 0].sqrt(), both[:, 1].view(shards, -1).sum(1)
    else:
        gradient = plain_variation(images)
        norms = torch.linalg.vector_norm(gradient, dim=(1, 2, 3))
        shard_pairs = zip(images.chunk(shards), gradient.chunk(shards), strict=True)
        inner = torch.stack([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in shard_pairs])
    # For a quadratic form, the value is half the inner product with the gradient.
    value = inner / (images.numel() // shards)
    return (value[0] if shards == 1 else value), gradient, norms

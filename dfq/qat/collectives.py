"""What processes that share a batch out among them have to exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..runtime.distributed import World
from .losses import feature_moments


def batch_variances(
    world: World,
    features: Mapping[str, Tensor],
    images: int,
    *,
    layers: int,
    device: torch.device,
) -> Tensor:
    """Variance of each layer's features over a batch of which each process holds a part.

    Args:
        world: the processes; each calls this.
        features: of this process's part, layer name -> tensor; empty where it has no image.
        images: how many that part has.
        layers: how many layers there are.
        device: where to compute.

    Returns:
        `(layers,)`, in the order of `features`, the same in all processes.
    """
    # Each writes what it knows into its row, and all rows meet in the sum.
    rows = torch.zeros(world.size, 3, layers, device=device)
    if images:
        rows[world.rank, 0] = images
        rows[world.rank, 1:] = feature_moments(features)
    counts, means, variances = world.all_reduce_sum(rows).unbind(1)
    share = counts / counts.sum(dim=0)
    mean = (share * means).sum(dim=0)
    return (share * (variances + (means - mean).square())).sum(dim=0)


@torch.no_grad()
def add_up_gradients(world: World, parameters: Sequence[nn.Parameter], values: Tensor) -> Tensor:
    """Add up the gradients of `parameters`, in place, and `values` over all processes at once.

    Args:
        world: the processes; each calls this.
        parameters: the same in all; one without a gradient gets one.
        values: `(n,)`, for example the terms of the loss.

    Returns:
        The sum of `values`, `(n,)`.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.reshape(-1) for g in gradients), values])
    *parts, values = world.all_reduce_sum(flat).split(
        [*(g.numel() for g in gradients), len(values)]
    )
    # Copied, for the gradients keep the memory layout of their parameters.
    torch._foreach_copy_(
        gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]
    )
    return values

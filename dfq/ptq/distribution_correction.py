"""PD-Quant's Distribution Correction: a block's float inputs are moved to where the statistics that
BatchNorm keeps of the training data are met inside the block.

A few calibration images do not have the statistics of the training data, and a block that follows
the float one on them alone learns theirs. The input A is replaced by the A' that minimises

    sum over the BatchNorms of |mu - mu'|^2 + |sigma - sigma'|^2, averaged over the images,
    + |A' - A|^2 / lambda_c,

mu and sigma the running mean and standard deviation of a BatchNorm's input, mu' and sigma' those of
each image, the square of the inputs' distance summed over the channels and averaged over the rest
(the public code of Liu et al., CVPR 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..graph.execution import hooks
from ..graph.fold_batchnorm import FoldedBatchNorm
from .block_io import Call
from .objectives.block_error import squared_error

LAMBDA = 0.02
"""lambda_c of the public code."""

STEPS, RATE = 10, 1e-2
"""Of Adam on each batch; the rate is relative to the input's standard deviation, which is about 1
in the public code. That takes 500 steps of 1e-3: on a CPU most of the time of the method."""

EPSILON = 1e-6


def statistics_distance(inputs: Tensor, norm: FoldedBatchNorm) -> Tensor:
    """How far each image is from the running statistics, squared norms averaged over the images.

    Args:
        inputs: `(n, c, h, w)`, what the folded BatchNorm gave.
        norm: what stands in its place.
    """
    # Back to what went into the BatchNorm, which its statistics are of.
    safe = torch.where(norm.factor == 0, 1.0, norm.factor)
    before = (inputs - norm.shift.view(1, -1, 1, 1)) / safe.view(1, -1, 1, 1)
    flat = before.flatten(2) + norm.mean.view(1, -1, 1)
    mean, deviation = flat.mean(2), (flat.var(2) + EPSILON).sqrt()
    expected = (norm.var + EPSILON).sqrt()
    distance = (mean - norm.mean).square().sum() + (deviation - expected).square().sum()
    return distance / len(inputs)


def corrected(block: nn.Module, call: Call) -> Call:
    """The call of a float block with its floating inputs corrected; as it is where no folded
    BatchNorm is inside.

    Args:
        block: of the folded float network.
        call: what it is given; images along the first axis.
    """
    norms = [child for child in block.modules() if isinstance(child, FoldedBatchNorm)]
    leaves = tree_leaves((call.args, call.kwargs))
    start = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    if not norms or not start:
        return call
    spreads = [float(t.std().clamp_min(EPSILON)) if t.numel() > 1 else 1.0 for t in start]
    moved = [t.clone().requires_grad_(True) for t in start]
    groups = [
        {"params": [t], "lr": RATE * spread} for t, spread in zip(moved, spreads, strict=True)
    ]
    optimizer = torch.optim.Adam(groups)
    for _ in range(STEPS):
        distances: list[Tensor] = []

        def before(norm: nn.Module, inputs: tuple[Tensor, ...], into: Any = distances) -> None:
            assert isinstance(norm, FoldedBatchNorm)
            into.append(statistics_distance(inputs[0], norm))

        with hooks(norm.register_forward_pre_hook(before) for norm in norms), torch.enable_grad():
            changed = _replaced(call, moved)
            block(*changed.args, **changed.kwargs)
            stay = [
                squared_error(t, origin, spread**2)
                for t, origin, spread in zip(moved, start, spreads, strict=True)
            ]
            loss = torch.stack(distances).sum() + torch.stack(stay).sum() / LAMBDA
            gradients = torch.autograd.grad(loss, moved)
        for t, gradient in zip(moved, gradients, strict=True):
            t.grad = gradient
        optimizer.step()
    return _replaced(call, [t.detach() for t in moved])


def _replaced(call: Call, tensors: list[Tensor]) -> Call:
    """The call with other floating tensors, in their order."""
    left = iter(tensors)

    def replaced(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return next(left) if floating else value

    return Call(*tree_map(replaced, (call.args, call.kwargs)))

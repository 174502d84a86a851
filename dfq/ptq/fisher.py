"""The diagonal of the Fisher information of blocks' outputs, for the family's own predictions.

How much predictions change with a block's output z is, to second order, half of dz^T F dz, with F
the Fisher information: the expectation of g g^T, g the gradient with respect to z of log p(y | z)
where y is drawn from the predictions themselves. A draw and one backward pass give an estimate of
the diagonal of F for all blocks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from ..graph.execution import hooks
from ..models.base import DistillationPair, Model
from .objectives.block_error import channel_axis

DAMPING = 5.0
"""Added to weights whose mean is 1, as BRECQ's public code adds 1 to gradients: where most images
are sure of their class, a few would have all the say. From 1 to 5 YOLOv5n ends equally close, a
ResNet-20 of CIFAR-10 at W2A2 closer with more."""


def score(pair: DistillationPair, generator: Generator) -> Tensor:
    """A draw of d log p(y) / d prediction, y from the prediction's own distribution, in its shape;
    its covariance is the Hessian of the divergence in `models.divergence` at temperature 1.

    Args:
        pair: whose student and teacher are the same.
        generator: on the CPU.
    """
    logits = pair.student.detach()
    uniform = torch.rand(logits.shape, generator=generator).to(logits.device)
    if pair.kind == "bernoulli":
        probability = logits.sigmoid()
        drawn = (uniform < probability).to(logits.dtype) - probability
    elif pair.kind == "categorical":
        # Gumbel's rule: the largest of logits and independent noise is a draw of the softmax.
        noisy = logits - torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-7)))
        one_hot = torch.zeros_like(logits).scatter_(pair.dim, noisy.argmax(pair.dim, True), 1.0)
        drawn = one_hot - logits.softmax(pair.dim)
    else:
        # A squared distance has a Hessian of 2: signs of this size have that for a covariance.
        drawn = torch.where(uniform < 0.5, -1.0, 1.0).to(logits.dtype) * 2**0.5
    return drawn if pair.weight is None else drawn * pair.weight.detach().sqrt()


def fisher_diagonals(
    model: Model, names: Sequence[str], batches: Sequence[Tensor], *, seed: int = 0
) -> dict[str, list[list[Tensor]]]:
    """Estimates of the diagonal for the outputs of blocks, smoothed: by channel over all images,
    times by place over the channels, as one draw says little of a single value.

    Args:
        model: the float network.
        names: of the blocks.
        batches: images `(n, 3, h, w)` in [0, 1].
        seed: of the draws.

    Returns:
        Name -> batch -> for each tensor of all the block's calls, weights broadcastable to it, with
        a mean of 1 over the set.
    """
    generator = Generator().manual_seed(seed)
    squares: dict[str, list[list[tuple[Tensor, Tensor]]]] = {name: [] for name in names}
    for batch in batches:
        outputs: dict[str, list[Tensor]] = {name: [] for name in names}

        def after(_m: nn.Module, _i: object, output: Any, name: str, into: Any = outputs) -> None:
            leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
            into[name].extend(t for t in leaves if t.requires_grad)

        with (
            torch.enable_grad(),
            hooks(
                model.module.get_submodule(name).register_forward_hook(
                    lambda m, i, o, name=name: after(m, i, o, name)
                )
                for name in names
            ),
        ):
            # Where weights are frozen, gradients need something to start from.
            raw = model.raw(batch.clone().requires_grad_(True))
            pairs = model.distillation_pairs(raw, raw)
            total = torch.stack([(p.student * score(p, generator)).sum() for p in pairs]).sum()
            tensors = [t for name in names for t in outputs[name]]
            gradients = iter(torch.autograd.grad(total, tensors, allow_unused=True))
        for name in names:
            rows = [_split(next(gradients), tensor) for tensor in outputs[name]]
            squares[name].append(rows)
    return {name: _smoothed(rows) for name, rows in squares.items()}


def _split(gradient: Tensor | None, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares by channel `(c,)` and by place, with an axis of 1 for the channels."""
    axis = channel_axis(tensor)
    if gradient is None:
        gradient = torch.zeros_like(tensor)
    square = gradient.float().square()
    others = [d for d in range(tensor.ndim) if d != axis]
    return square.mean(others), square.mean(axis, keepdim=True)


def _smoothed(rows: list[list[tuple[Tensor, Tensor]]]) -> list[list[Tensor]]:
    result: list[list[Tensor]] = [[] for _ in rows]
    for index in range(len(rows[0])):
        channels = torch.stack([batch[index][0] for batch in rows]).mean(0)
        mean = channels.mean().clamp_min(1e-30)
        for number, batch in enumerate(rows):
            place = batch[index][1]
            shape = [1] * place.ndim
            shape[channel_axis(place)] = -1
            smooth = (channels / mean).view(shape) * (place / mean)
            result[number].append((smooth + DAMPING) / (1 + DAMPING))
    return result

"""By how much layers' inputs are not distributed as in training, with the gradient written out.

Channels count as Gaussians, and a layer for the mean of its channels' Kullback-Leibler divergence
from those of the training data:

    1/2 (v / v_l + (mu - mu_l)^2 / v_l - 1 - ln(v / v_l))

The gradient goes straight to what it is of the layers' inputs: of a value x by way of its channel's
moments it is slope * x + offset.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..moment_sums import Pass
from .expected import Expected

LEAST = 1e-6
"""Of a variance over the expected one: below, it counts as that and has no gradient."""


class DivergenceConstants:
    """What stays the same from one pass to the next.

    Args:
        known: with factors relative to the expected statistics.
        runs: which were made, in their order.
        counts: by run, over how many values its moments are taken.
        weights: by run in their order, factors of the divergences, `(runs,)`; None: ones.

    Attributes:
        mean: expected, `(channels of all,)`.
        inverse, root: of the expected variances, their inverses and square roots of these; 0 for
            channels that do not count.
        weight, pull: of a channel in its run's divergence, and in the gradient of a value.
        owner: int64 `(groups * channels,)`: which of the groups' runs, in their order, a channel is
            of.
        shape: of the divergences: `(runs,)`, or `(groups, runs)`.
    """

    def __init__(
        self, known: Expected, runs: list[int], counts: tuple[int, ...], weights: Tensor | None
    ) -> None:
        self.mean = known.mean
        alive = known.to_mean > 0
        self.inverse = torch.where(alive, known.var.clamp_min(1e-12).reciprocal(), 0.0)
        self.root = self.inverse.sqrt()
        position = torch.zeros(known.count, dtype=torch.int64)
        position[runs] = torch.arange(len(runs))
        made = torch.zeros(known.count)
        made[runs] = 1
        place = position.to(known.run.device)[known.run]
        weight = 0.5 * alive * made.to(self.mean.device)[known.run] / known.alive[known.run]
        if weights is not None:
            weight = weight * weights[place]
        self.weight = weight
        self.pull = 2 * weight / known.counted(counts).clamp_min(1)
        self.shape = (len(runs),) if known.groups == 1 else (known.groups, len(runs))
        first = torch.arange(known.groups, device=place.device) * len(runs)
        self.owner = (place + first[:, None]).flatten()


class Divergence(torch.autograd.Function):
    """Divergences of a pass, see `DivergenceConstants.shape`; or, where they are to be `normed`,
    their L2 norms, `()` or `(groups,)`: the worst layers count most, so that none is given up for
    the many.

    The gradient goes to the layers of `passed`, whose moments are those of `whole` or a part of it.
    """

    @staticmethod
    def forward(
        ctx: Any, passed: Pass, whole: Pass, constants: DivergenceConstants, normed: bool,
        *tokens: Tensor,
    ) -> Tensor:  # fmt: skip
        away = (whole.mean - constants.mean).mul_(constants.root)
        ratio = (whole.var * constants.inverse).clamp_(min=LEAST)
        values = torch.addcmul(ratio - 1, away, away).sub_(ratio.log()).mul_(constants.weight)
        size = constants.shape[-1] * (len(values) if values.ndim == 2 else 1)
        sums = values.new_zeros(size).index_add_(0, constants.owner, values.flatten())
        sums = sums.view(constants.shape)
        ctx.passed, ctx.constants = passed, constants
        ctx.token, ctx.count = tokens[0].detach(), len(tokens)
        ctx.away, ctx.ratio, ctx.mean = away, ratio, whole.mean
        ctx.sums = ctx.norm = None
        if not normed:
            return sums
        norm = torch.linalg.vector_norm(sums, dim=-1)
        ctx.sums, ctx.norm = sums, norm.detach()
        return norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        constants, ratio = ctx.constants, ctx.ratio
        if ctx.sums is not None:
            grad = (grad / ctx.norm.clamp_min(1e-30))[..., None] * ctx.sums
        pull = grad.reshape(-1).index_select(0, constants.owner).view(ratio.shape)
        pull = pull.mul_(constants.pull)
        # Where the ratio was limited it counts as met.
        slope = 1 - F.threshold(ratio, LEAST, 1.0).reciprocal_()
        slope = slope.mul_(constants.inverse).mul_(pull)
        offset = pull.mul_(ctx.away).mul_(constants.root)
        ctx.passed.set_linear(slope, offset.addcmul_(slope, ctx.mean, value=-1))
        return None, None, None, None, *[ctx.token] * ctx.count

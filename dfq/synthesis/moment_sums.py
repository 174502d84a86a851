"""The moments of one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.batchnorm import adds_up
from .losses.expected import Expected


class Pass:
    """The moments of one forward pass, of all channels of all runs end to end.

    Attributes:
        mean, var: float32 `(channels of all,)`, by group where there are several, as in `Expected`;
            zero for a run that was not made.
        counts: by run, over how many values each of them was taken.
        summed: whether mean and variance are still sums, see `grouped_sums`.
        slope, offset: the gradient of the input x by way of its moments is slope * x + offset;
            known once the gradient of the moments is.
    """

    slope: Tensor
    offset: Tensor

    def __init__(self, known: Expected) -> None:
        self.known = known
        self.mean, self.var = known.zeros(), known.zeros()
        self.counts = [0] * known.count
        self.summed = adds_up(known.mean.device)

    def finish(self) -> None:
        """Make moments of sums."""
        if self.summed:
            count = self._count().clamp_min(1)
            away = self.mean / count
            self.var = (self.var / count - away.square()).clamp_min(0)
            self.mean = self.known.mean + away
            self.summed = False

    def extend(self, known: Expected) -> None:
        """Make room for runs that were not known of when the pass began."""
        missing = known.count - len(self.counts)
        if missing == 0:
            return
        more = known.zeros()[..., self.mean.shape[-1] :]
        self.mean, self.var = torch.cat([self.mean, more], -1), torch.cat([self.var, more], -1)
        self.counts += [0] * missing
        self.known = known

    def channels(self, run: int, group: int) -> tuple[Tensor, Tensor]:
        """Views of the mean and the variance of a run in a group, contiguous, `(channels of the
        run,)` each."""
        part = self.known.channels[run]
        if self.known.groups == 1:
            return self.mean[part], self.var[part]
        return self.mean[group, part], self.var[group, part]

    def _count(self) -> Tensor:
        return self.known.counted(tuple(self.counts))

    def add(self, other: Pass) -> None:
        """Count `other` as a further part of the same batch (Chan et al., 1979)."""
        ours, theirs = self._count(), other._count()
        share = theirs / (ours + theirs).clamp_min(1)
        away = other.mean - self.mean
        self.var = torch.lerp(self.var, other.var, share) + share * (1 - share) * away.square()
        self.mean = self.mean + share * away
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]

    def differentiate(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradients of the moments, `(channels,)` or `(groups, channels)` each, the slope
        and the offset of the gradient of a value x, slope * x + offset: of the same shape."""
        count = self._count().clamp_min(1)
        slope = 2 * var / count
        return slope, mean / count - slope * self.mean

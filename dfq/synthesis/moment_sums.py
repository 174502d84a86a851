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
        # Of all runs at once: a slice for each takes several times as long.
        self._views: dict[tuple[str, bool], tuple[Tensor, ...]] = {}
        self._starts: dict[str, int] = {}
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
            self._moved()

    def extend(self, known: Expected) -> None:
        """Make room for runs that were not known of when the pass began."""
        missing = known.count - len(self.counts)
        if missing == 0:
            return
        more = known.zeros()[..., self.mean.shape[-1] :]
        self.mean, self.var = torch.cat([self.mean, more], -1), torch.cat([self.var, more], -1)
        self.counts += [0] * missing
        self.known = known
        self._moved()

    def channels(self, run: int, group: int) -> tuple[Tensor, Tensor]:
        """Views of the mean and the variance of a run in a group, contiguous, `(channels of the
        run,)` each."""
        mean, var = self._parts("mean")[run], self._parts("var")[run]
        return (mean, var) if self.known.groups == 1 else (mean[group], var[group])

    def sums(self, run: int) -> tuple[Tensor, Tensor]:
        """Views of what `mean` and `var` hold of a run before `finish`, `(groups, channels of the
        run)` each."""
        return self._parts("mean", by_group=True)[run], self._parts("var", by_group=True)[run]

    @property
    def alone(self) -> bool:
        """Whether there are moments of one group, which `addresses` gives."""
        return not self.summed and self.known.groups == 1

    def addresses(self, run: int, *names: str) -> list[int]:
        """Where in memory the channels of a run begin, in attributes of those names or, for
        "expected", in `known.mean`."""
        behind, starts = self.known.bytes_before[run], self._starts
        for name in names:
            if name not in starts:
                values = self.known.mean if name == "expected" else getattr(self, name)
                starts[name] = values.data_ptr()
        return [starts[name] + behind for name in names]

    def _moved(self) -> None:
        """Attributes are other tensors than before."""
        self._views.clear()
        self._starts.clear()

    def linear(self, run: int) -> tuple[Tensor, Tensor]:
        """Views of slope and offset of a run, `(channels of the run,)`, by group where there are
        several."""
        return self._parts("slope")[run], self._parts("offset")[run]

    def set_linear(self, slope: Tensor, offset: Tensor) -> None:
        """The gradient of the moments is known."""
        self.slope, self.offset = slope, offset
        self._moved()

    def _parts(self, name: str, *, by_group: bool = False) -> tuple[Tensor, ...]:
        """An attribute by run; `by_group`: with a dimension of groups even where there is one."""
        key = name, by_group
        if key not in self._views:
            values: Tensor = getattr(self, name)
            values = values.view(self.known.groups, -1) if by_group else values
            self._views[key] = values.split(self.known.sizes, -1)
        return self._views[key]

    def _count(self) -> Tensor:
        return self.known.counted(tuple(self.counts))

    def add(self, other: Pass) -> None:
        """Count `other` as a further part of the same batch (Chan et al., 1979)."""
        ours, theirs = self._count(), other._count()
        share = theirs / (ours + theirs).clamp_min(1)
        away = other.mean - self.mean
        self.var = torch.lerp(self.var, other.var, share) + share * (1 - share) * away.square()
        self.mean = self.mean + share * away
        self._moved()
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]

    def differentiate(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradients of the moments, `(channels,)` or `(groups, channels)` each, the slope
        and the offset of the gradient of a value x, slope * x + offset: of the same shape."""
        count = self._count().clamp_min(1)
        slope = 2 * var / count
        return slope, mean / count - slope * self.mean

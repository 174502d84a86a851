"""What BatchNorm layers say of their inputs: the statistics of the training data."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ...graph.fold_batchnorm import FoldedBatchNorm

CONSTANT = 1e-4
"""Of eps: a channel with less variance gives the same whatever the image, to 1 % of its gamma, and
has no spread that a difference could be measured in."""


def expected_statistics(
    layer: _BatchNorm | FoldedBatchNorm, *, relative: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a layer says of its input y, and what a difference from it counts, each `(c,)`.

    Args:
        layer: folded or not.
        relative: see `BatchNormStatistics.distances`.

    Returns:
        Mean and variance of y; and the factors that a difference from them is multiplied by before
        the norm over the channels is taken: back to the input x of the BatchNorm, in the units
        asked for.
    """
    if isinstance(layer, FoldedBatchNorm):
        # y = factor * (x - mean_l) + shift. A channel whose gamma has died says nothing about x.
        alive = layer.factor.abs() > 1e-3 * layer.factor.abs().median()
        inverse = torch.where(alive, 1 / layer.factor, 0.0)
        mean, var, stored = layer.shift, layer.var * layer.factor.square(), layer.var
    else:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, var, stored = layer.running_mean, layer.running_var, layer.running_var
        inverse = torch.ones_like(var)
    to_mean, to_var = inverse, inverse.square()
    if relative:
        spread, root = stored + 1e-5, math.sqrt(len(stored))
        varies = (stored >= CONSTANT * layer.eps) / root
        to_mean, to_var = to_mean * spread.rsqrt() * varies, to_var / spread * varies
    return mean, var, to_mean, to_var


class Expected:
    """What is known of all channels of all layers, end to end, so that one operation does for a
    network what would else be dozens of small ones for each layer.

    Args:
        layers: one for each run: a layer that runs twice in a pass is there twice.
        relative: see `BatchNormStatistics.distances`.
        groups: of images, with moments of their own: values of channels are `(channels of all,)`
            for one group, `(groups, channels of all)` for more.

    Attributes:
        mean, var: expected of the layers' inputs, `(channels of all,)`.
        to_mean, to_var: factors of the differences from them.
        run: index of the run a channel belongs to.
        count: the number of runs.
        sizes: by run, the number of its channels.
        means: by run, the expected mean, `(channels of the run,)`.
        bytes_before: by run, how far into `mean` its channels begin.
    """

    def __init__(
        self, layers: Iterable[_BatchNorm | FoldedBatchNorm], relative: bool, groups: int = 1
    ) -> None:
        means, variances, to_means, to_vars, owners = [], [], [], [], []
        for index, layer in enumerate(layers):
            mean, var, to_mean, to_var = expected_statistics(layer, relative=relative)
            means.append(mean)
            variances.append(var)
            to_means.append(to_mean)
            to_vars.append(to_var)
            owners.append(torch.full_like(mean, index, dtype=torch.long))
        self.mean, self.var = torch.cat(means), torch.cat(variances)
        self.to_mean, self.to_var = torch.cat(to_means), torch.cat(to_vars)
        self.run, self.count, self.groups = torch.cat(owners), len(owners), groups
        first = torch.arange(groups, device=self.run.device) * self.count
        self._owner = (self.run + first[:, None]).flatten()
        self.sizes = [len(mean) for mean in means]
        self.means = self.mean.split(self.sizes)
        size = self.mean.element_size()
        self.bytes_before = [size * before for before in accumulate(self.sizes, initial=0)]
        self._counted: dict[tuple[int, ...], Tensor] = {}
        self._orders: dict[tuple[int, ...], Tensor] = {}

    def zeros(self) -> Tensor:
        """Zeros `(channels,)`, or `(groups, channels)` where there are several groups."""
        shape = self.mean.shape if self.groups == 1 else (self.groups, len(self.mean))
        return self.mean.new_zeros(shape)

    def counted(self, counts: tuple[int, ...]) -> Tensor:
        """What there is one of for each run as one for each channel: `(channels of all,)`."""
        if counts not in self._counted:
            values = torch.tensor(counts, dtype=self.mean.dtype, device=self.mean.device)
            self._counted = {counts: values[self.run]}
        return self._counted[counts]

    @functools.cached_property
    def alive(self) -> Tensor:
        """How many channels of each run count (`to_mean` above 0), at least 1: `(runs,)`."""
        sums = torch.zeros_like(self.mean[: self.count])
        living = (self.to_mean > 0).to(self.mean.dtype)
        return sums.index_add(0, self.run, living).clamp_min(1)

    def of_runs(self, values: Tensor, runs: list[int]) -> Tensor:
        """Values `(..., runs)` in another order, or of some runs."""
        if runs == list(range(self.count)):
            return values
        key = tuple(runs)
        if key not in self._orders:
            self._orders = {key: torch.tensor(runs, device=values.device)}
        return values.index_select(-1, self._orders[key])

    def sums(self, values: Tensor) -> Tensor:
        """Over the channels of each run: `(runs,)` of `(channels of all,)`, by group where there
        are several."""
        if values.ndim == 1:
            return values.new_zeros(self.count).index_add(0, self.run, values)
        zeros = values.new_zeros(self.groups * self.count)
        return zeros.index_add(0, self._owner, values.flatten()).view(self.groups, self.count)

    def norms(self, values: Tensor) -> Tensor:
        """L2 norms over the channels of each run, shaped as `sums`."""
        # Away from zero, where the root has no gradient.
        return self.sums(values.square()).clamp_min(1e-30).sqrt()

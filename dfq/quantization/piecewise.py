"""Weights on a grid of two regions (PWLQ, Fang et al., ECCV 2020): fine near zero, coarse beyond.

With the greatest magnitude m and a breakpoint p, magnitudes below p are rounded to multiples of a
fine step, those from p on to p plus multiples of a coarse one. Of b bits one says the sign and one
the region; H = 2^(b-2) levels of each region are left for the magnitude:

    |w| < p:   |w_hat| = s k,       s = p / (H - 1/2),         k = min(round(|w| / s), H - 1)
    |w| >= p:  |w_hat| = p + t k,   t = (m - p) / (H - 1),     k = min(round((|w| - p) / t), H - 1)

This is the public code's grid of regions that do not overlap, which calls it one of b - 1 bits, as
it does not count the bit of the region. p has the least squared error of 99 shares of m, channel by
channel; for a Gaussian of deviation 1 it is near ln(0.8614 m + 0.6079), the code's approximation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from .quantizers import Quantizer

SHARES = 100
"""Of the greatest magnitude, into which it is divided for the search of the breakpoint."""

LEAST_BITS = 3
"""With 2 there is one level of each region: nothing to put between breakpoint and maximum."""


class PiecewiseQuantizer(Quantizer):
    """A quantizer of weights on the grid above.

    `log_scale` is that of the fine step, and the zero point is 0. Integers count levels from zero:
    from -(2H - 1) to 2H - 1, fine ones below H in magnitude. Its steps are not trained, and
    gradients go straight through.

    Args:
        bits: 3 to 8.
        channels: see `Quantizer`.

    State besides: `coarse_scale` `(channels,)`, the coarse step.
    """

    searched = False
    coarse_scale: Tensor

    def __init__(self, bits: int, *, channels: int = 1) -> None:
        super().__init__(bits, channels=channels)
        self.log_scale.requires_grad_(False)
        self.register_buffer("coarse_scale", torch.ones(channels))

    @property
    def half(self) -> int:
        """H, the levels of a region on either side of zero."""
        return int(2 ** (self.bits - 2))

    @property
    def breakpoint(self) -> Tensor:
        """p of each channel, `(channels,)`."""
        return self.scale.detach() * (self.half - 0.5)

    @torch.no_grad()
    def search(self, rows: Tensor) -> None:
        """Find the breakpoints of weights `(channels, n)`.

        Raises:
            UserError: it has less than 3 bits.
        """
        if self.bits < LEAST_BITS:
            raise UserError(
                f"quantization.weight_grid: piecewise takes weights of {LEAST_BITS} bits or more "
                f"(a bit for the sign, one for the region), not {self.bits}"
            )
        most = rows.abs().amax(dim=1)
        most = torch.where(most > 0, most, torch.ones_like(most))
        best, breakpoints = torch.full_like(most, float("inf")), most / 2
        for step in range(1, SHARES):
            point = most * (step / SHARES)
            self._set(point, most)
            error = (self.values(self._rounded(rows)) - rows).square().mean(dim=1)
            breakpoints = torch.where(error < best, point, breakpoints)
            best = torch.minimum(error, best)
        self._set(breakpoints, most)

    def _set(self, point: Tensor, most: Tensor) -> None:
        self.initialise(point / (self.half - 0.5))
        self.coarse_scale.copy_((most - self.breakpoint) / (self.half - 1))

    def _rounded(self, x: Tensor) -> Tensor:
        magnitude = x.detach().float().abs()
        shape = (-1, *([1] * (x.ndim - 1)))
        point, coarse = self.breakpoint.view(shape), self.coarse_scale.view(shape)
        inner = (magnitude / self.scale_of(x)).round().clamp_max(self.half - 1)
        outer = ((magnitude - point) / coarse).round().clamp(0, self.half - 1) + self.half
        return x.detach().sign() * torch.where(magnitude < point, inner, outer)

    @torch.no_grad()
    def values(self, integers: Tensor) -> Tensor:
        shape = (-1, *([1] * (integers.ndim - 1)))
        point, coarse = self.breakpoint.view(shape), self.coarse_scale.view(shape)
        count = integers.abs()
        inner, outer = count * self.scale_of(integers), point + (count - self.half) * coarse
        return integers.sign() * torch.where(count < self.half, inner, outer)

    def _quantize(self, x: Tensor) -> Tensor:
        # The difference is 0, and its gradient 1.
        return self.values(self.integers(x)) + (x - x.detach())

    def extra_repr(self) -> str:
        return f"{self.bits} bit, piecewise, {self.channels} channels"

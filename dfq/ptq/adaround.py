"""AdaRound (Nagel et al., ICML 2020): whether each weight is rounded up or down is learned.

With step size s and base b, one of two neighbouring integers of w / s, the weight in training is

    w_soft = s * clamp(b + h(V), lo, hi),   h(V) = clamp(sigmoid(V) * (zeta - gamma) + gamma, 0, 1),

gamma = -0.1 and zeta = 1.1 (eq. 22 and 23), and the regulariser that drives h to 0 or 1 is

    sum(1 - |2 h(V) - 1|^beta)   (eq. 24).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantization.quantizers import Quantizer

GAMMA, ZETA = -0.1, 1.1
"""How far the sigmoid is stretched beyond 0 and 1, so that h reaches both."""

TRUST = 0.95
"""Of the start from integers: h lies so much of the way from the weight itself to its integer.
YOLOv5n at W4A4, 60 steps a block, divergence on photographs of VOC: 44 with 0.5, 30.2 with 0.8,
30.1 with 0.95; 38.9 where integers cannot change at all."""

OPEN = 0.05
"""How far from 0 and 1 h starts at least where integers are given: at the ends it has no
gradient."""


class SoftRounding(nn.Module):
    """Takes the place of a layer's weight quantizer while its rounding is learned.

    Args:
        quantizer: of the weights, calibrated; not changed.
        weight: the float weights, in the layer's shape.
        codes: integers counted from the zero point, in that shape, to start from (GPTQ's); None: h
            starts where w_soft is the float weight.

    Attributes:
        variable: V, in the weight's shape; the only parameter.
    """

    base: Tensor
    scale: Tensor
    least: Tensor
    largest: Tensor

    @torch.no_grad()
    def __init__(self, quantizer: Quantizer, weight: Tensor, codes: Tensor | None = None) -> None:
        super().__init__()
        weight = weight.detach().float()
        scale = quantizer.scale_of(weight)
        least, largest = quantizer.limits_of(weight)
        steps = (weight / scale).maximum(least).minimum(largest)
        if codes is None:
            # Both neighbours are to be on the grid.
            base = steps.floor().minimum(largest - 1)
            start = steps - base
        else:
            base = torch.where(steps >= codes, codes, codes - 1)
            base = base.maximum(least).minimum(largest - 1)
            nearest = (steps - base).clamp(0, 1)
            start = nearest + TRUST * ((codes - base) - nearest)
            start = start.clamp(OPEN, 1 - OPEN)
        for name, value in (("base", base), ("scale", scale), ("least", least)):
            self.register_buffer(name, value)
        self.register_buffer("largest", largest)
        # h(V) = start, by the inverse of the stretched sigmoid.
        self.variable = nn.Parameter(torch.logit((start - GAMMA) / (ZETA - GAMMA)))

    def share(self) -> Tensor:
        """h(V), in [0, 1]: how far each weight is from its lower integer to its upper one."""
        return (torch.sigmoid(self.variable) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """w_soft, whatever the weight is: its values are in `base` and `variable`."""
        return self.scale * (self.base + self.share())

    def regulariser(self, beta: float) -> Tensor:
        """Sum over the weights of 1 - |2 h(V) - 1|^beta: 0 where all are rounded."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """The weights on their grid: each at its upper integer where h(V) >= 1/2."""
        return self.scale * (self.base + (self.share() >= 0.5).float())

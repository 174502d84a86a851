"""Dynamic quantization: the grid of an activation is that of the tensor at hand, found anew in each
call and on no calibration set."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .quantizers import Quantizer, fake_quantize
from .range_search import grid_above, grid_between


class DynamicQuantizer(Quantizer):
    """A quantizer per tensor whose grid spans least and greatest value of each call.

    Its step size and zero point in the state dict have no meaning, and are not trained; the
    gradient is that of rounding straight through.
    """

    searched = False

    def __init__(self, bits: int, *, asymmetric: bool = False, unsigned: bool = False) -> None:
        super().__init__(bits, asymmetric=asymmetric, unsigned=unsigned)
        self.log_scale.requires_grad_(False)
        self.zero_point.requires_grad_(False)
        self.initialised.fill_(True)

    def _quantize(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        low, high = (end[None] for end in x.detach().aminmax())
        scale, zero = grid_above(self, low, partial(grid_between, low, high, self.bits))
        return fake_quantize(x, scale, zero, *self.bounds, strict=self.strict)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dynamic"


def is_dynamic(module: nn.Module) -> bool:
    """Whether a network has any such quantizer."""
    return any(isinstance(child, DynamicQuantizer) for child in module.modules())

"""Powers of two for the outputs of softmax, which crowd near zero (FQ-ViT, Lin et al., IJCAI 2022).

    q = clamp(round(-log2(p)), 0, 2^b - 1),        p_hat = 2^-q.

What is beyond the last code gets the least level, 2^-(2^b - 1), as this equation has it, zero
included. The published code of FQ-ViT gives zero there, for which it keeps a mask beside the codes;
the levels here are all that b bits hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantizers import Quantizer


class LogarithmicQuantizer(Quantizer):
    """A quantizer of values in [0, 1], whose levels are 1, 1/2, 1/4 and so on.

    It has neither step size nor zero point: those in the state dict have no meaning, and are not
    trained. Gradients go straight through, and are 0 for what is beyond the last code.
    """

    searched = False

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.log_scale.requires_grad_(False)
        self.initialised.fill_(True)

    def _quantize(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        last = 2**self.bits - 1
        codes = x.detach().log2().neg_().round_()
        level = torch.exp2(-codes.clamp(0, last))
        # The difference is 0, and its gradient 1.
        return level + torch.where(codes <= last, x - x.detach(), 0.0)

    def extra_repr(self) -> str:
        return f"{self.bits} bit, powers of two"

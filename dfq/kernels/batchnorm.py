"""BatchNorm statistics fused with the activation they are taken before, for CPUs.

A SiLU reads and writes what its BatchNorm gave anyway; with `batchnorm.c`, the mean and variance on
the way forwards, and their gradient on the way back, are taken in the same passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .loader import call, usable

_WIDEST = 8192


def _fits(x: Tensor) -> bool:
    """Whether the compiled functions take `x` as it lies in memory."""
    return (
        x.ndim == 4
        and x.shape[1] <= _WIDEST
        and x.is_contiguous(memory_format=torch.channels_last)
        and usable(x)
    )


def _call(name: str, x: Tensor, *others: Tensor) -> None:
    channels = x.shape[1]
    call(name, x.dtype, (x, *others), x.numel() // channels, channels)


def moments(x: Tensor, expected: Tensor, mean: Tensor, var: Tensor, silu: bool) -> Tensor:
    """Mean and biased variance of each channel of `x`, over all else, and `x` or its SiLU.

    Args:
        x: `(n, c, ...)`, of any floating type.
        expected: float32 `(c,)`, about the mean; the nearer, the less is lost to rounding.
        mean, var: float32 `(c,)`, dense: what is found is written there.
        silu: whether to give silu(x), or x itself.
    """
    if _fits(x):
        if not silu:
            _call("moments", x, expected, mean, var)
            return x
        out = torch.empty_like(x)
        _call("silu_and_moments", x, out, expected, mean, var)
        return out
    # The kernel BatchNorm itself uses: one pass, in float32 whatever the dtype of x.
    unused = torch.zeros_like(mean)
    found = torch.ops.aten.batch_norm_update_stats(x, unused, unused.clone(), 0.0)
    mean.copy_(found[0])
    var.copy_(found[1])
    return F.silu(x) if silu else x


def moments_backward(x: Tensor, grad: Tensor, slope: Tensor, offset: Tensor, silu: bool) -> Tensor:
    """The gradient of `x`: what `grad` says, and `slope * x + offset` for its mean and variance.

    Args:
        x: as `moments` was given it.
        grad: of what it gave.
        slope, offset: float32 `(c,)`.
        silu: as then.
    """
    if _fits(x) and grad.dtype == x.dtype:
        out = torch.empty_like(x)
        grad = grad.contiguous(memory_format=torch.channels_last)
        _call("silu_backward" if silu else "add_linear", x, grad, out, slope, offset)
        return out
    # slope * x + offset by the kernel of a BatchNorm in eval mode: it takes half-precision x with
    # float32 factors, and a broadcast addcmul is up to ten times slower on a CPU.
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    linear = torch.batch_norm(x, slope, offset, zero, one, False, 0.0, 0.0, False)
    return linear.add_(torch.ops.aten.silu_backward(grad, x) if silu else grad)


def gaussian_divergence(offset: Tensor, var: Tensor, expected: Tensor) -> Tensor:
    """Kullback-Leibler divergence of Gaussians from expected ones, elementwise, nats.

    Args:
        offset: mean less the expected one.
        var: variance; the least that counts is a millionth of the expected one.
        expected: variance of the expected ones.
    """
    stored = expected.clamp_min(1e-12)
    ratio = (var / stored).clamp_min(1e-6)
    return 0.5 * (ratio + offset.square() / stored - 1 - ratio.log())

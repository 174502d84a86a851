"""BatchNorm statistics fused with the activation they are taken before.

A SiLU reads and writes what its BatchNorm gave anyway; with `batchnorm.c` on a CPU, and `fused` on
a GPU, the mean and variance on the way forwards, and their gradient on the way back, are taken in
the same passes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .loader import function, usable
from .operations import OPERATIONS, row_step

_WIDEST = 8192


def _fits(x: Tensor) -> bool:
    """Whether the compiled functions take `x` as it lies in memory."""
    return (
        x.ndim == 4
        and x.shape[1] <= _WIDEST
        and x.is_contiguous(memory_format=torch.channels_last)
        and usable(x)
    )


def _in_rows(grad: Tensor) -> Tensor:
    """A gradient as the compiled functions take it; that of a part of a concatenation as it is."""
    if row_step(grad) is not None:
        return grad
    return grad.contiguous(memory_format=torch.channels_last)


def _call(name: str, x: Tensor, *others: Tensor) -> None:
    OPERATIONS[name](x, *others)


def silu_with_moments(x: Tensor, expected: int, mean: int, var: int) -> Tensor | None:
    """`moments` with a SiLU, without the steps in between: to call an operation and to look at its
    tensors takes as long as a small layer itself.

    Args:
        x: as there.
        expected, mean, var: addresses of what they are there.

    Returns:
        silu(x); None where the compiled function does not take `x`, or somebody counts operations.
    """
    if not _fits(x) or _get_current_dispatch_mode() is not None:
        return None
    out, channels = torch.empty_like(x), x.shape[1]
    run = function("silu_and_moments", x.dtype)
    run(x.data_ptr(), out.data_ptr(), expected, mean, var, x.numel() // channels, channels)
    return out


def silu_with_moments_backward(x: Tensor, grad: Tensor, slope: int, offset: int) -> Tensor | None:
    """`moments_backward` of a SiLU, as `silu_with_moments` is `moments`."""
    if not _fits(x) or grad.dtype != x.dtype or _get_current_dispatch_mode() is not None:
        return None
    channels, apart = x.shape[1], row_step(grad)
    if apart is None:
        return None
    out = torch.empty_like(x)
    run, rows = function("silu_backward", x.dtype), x.numel() // channels
    run(x.data_ptr(), grad.data_ptr(), out.data_ptr(), slope, offset, rows, channels, apart)
    return out


def adds_up(device: torch.device) -> bool:
    """Whether `grouped_sums` is quicker than `grouped_moments` there."""
    return _fused(device) is not None


@functools.cache
def _fused(device: torch.device) -> ModuleType | None:
    """The kernels for a GPU, where they can be had."""
    if device.type != "cuda":
        return None
    try:
        from . import fused
    except ImportError:
        return None
    return fused if fused.why_not(device) is None else None


def grouped_sums(x: Tensor, expected: Tensor, total: Tensor, squares: Tensor, silu: bool) -> Tensor:
    """Sums over each channel of how far `x` is from what is expected, and of the squares of that,
    and `x` or its SiLU.

    Args:
        x: `(groups * n, c, ...)`.
        expected: float32 `(c,)`.
        total, squares: float32 `(groups, c)`: where it is added.
        silu: whether to give silu(x), or x itself.
    """
    kernels = _fused(x.device)
    if kernels is not None and kernels.fits(x):
        return cast(Tensor, kernels.sums(x, expected, total, squares, silu))
    groups = len(total)
    statistics = torch.zeros(2, *total.shape, dtype=total.dtype, device=total.device)
    where = [(statistics[0, group], statistics[1, group]) for group in range(groups)]
    out = grouped_moments(x, expected, where, silu)
    count, away = x.numel() // x.shape[1] // groups, statistics[0] - expected
    total += away * count
    squares += (statistics[1] + away.square()) * count
    return out


def grouped_moments(
    x: Tensor, expected: Tensor, where: Sequence[tuple[Tensor, Tensor]], silu: bool
) -> Tensor:
    """`moments` of groups of images, one after the other.

    Args:
        x: `(groups * n, c, ...)`.
        expected: as for `moments`.
        where: by group, where mean and variance are written.
        silu: as for `moments`.
    """
    if len(where) == 1:
        return moments(x, expected, *where[0], silu)
    if _fits(x) and silu:
        out = torch.empty_like(x)
        for part, out_part, statistics in zip(
            x.chunk(len(where)), out.chunk(len(where)), where, strict=True
        ):
            _call("silu_and_moments", part, out_part, expected, *statistics)
        return out
    for part, statistics in zip(x.chunk(len(where)), where, strict=True):
        moments(part, expected, *statistics, silu=False)
    return F.silu(x) if silu else x


def grouped_moments_backward(
    x: Tensor, grad: Tensor, slope: Tensor, offset: Tensor, silu: bool
) -> Tensor:
    """`moments_backward` of groups of images.

    Args:
        x, grad, silu: as there.
        slope, offset: `(c,)` of one group, else `(groups, c)`.
    """
    kernels = _fused(x.device)
    if kernels is not None and kernels.fits(x):
        slopes = slope.view(-1, slope.shape[-1]) if slope.ndim == 1 else slope
        offsets = offset.view(-1, offset.shape[-1]) if offset.ndim == 1 else offset
        return cast(Tensor, kernels.backward(x, grad, slopes, offsets, silu))
    if slope.ndim == 1:
        return moments_backward(x, grad, slope, offset, silu)
    groups = len(slope)
    if _fits(x) and grad.dtype == x.dtype:
        out, name = torch.empty_like(x), "silu_backward" if silu else "add_linear"
        grad = _in_rows(grad)
        for index, parts in enumerate(
            zip(x.chunk(groups), grad.chunk(groups), out.chunk(groups), strict=True)
        ):
            _call(name, *parts, slope[index], offset[index])
        return out
    through = torch.ops.aten.silu_backward(grad, x) if silu else grad.clone()
    for index, (part, part_grad) in enumerate(
        zip(x.chunk(groups), through.chunk(groups), strict=True)
    ):
        part_grad += _linear(part, slope[index], offset[index])
    return through


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
    return plain_moments(x, mean, var, silu)


def plain_moments(x: Tensor, mean: Tensor, var: Tensor, silu: bool) -> Tensor:
    """`moments` by PyTorch's operations."""
    # The kernel BatchNorm itself uses: one pass, in float32 whatever the dtype of x.
    count = x.numel() // x.shape[1]
    if x.is_cuda and count > 1:
        # As running statistics that have no past: written where they are wanted, without copies.
        torch.ops.aten.batch_norm_update_stats(x, mean, var, 1.0)
        var *= (count - 1) / count
        return F.silu(x) if silu else x
    unused = torch.zeros_like(mean)
    batch_mean, batch_var = torch.ops.aten.batch_norm_update_stats(x, unused, unused.clone(), 0.0)
    mean.copy_(batch_mean)
    var.copy_(batch_var)
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
        grad = _in_rows(grad)
        _call("silu_backward" if silu else "add_linear", x, grad, out, slope, offset)
        return out
    return plain_moments_backward(x, grad, slope, offset, silu)


def plain_moments_backward(
    x: Tensor, grad: Tensor, slope: Tensor, offset: Tensor, silu: bool
) -> Tensor:
    """`moments_backward` by PyTorch's operations."""
    linear = _linear(x, slope, offset)
    return linear.add_(torch.ops.aten.silu_backward(grad, x) if silu else grad)


def _linear(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """slope * x + offset by the kernel of a BatchNorm in eval mode: it takes half-precision x with
    float32 factors, and a broadcast addcmul is up to ten times slower on a CPU."""
    zeros, ones = _zeros_ones(len(slope), slope.dtype, x.device)
    return torch.batch_norm(x, slope, offset, zeros, ones, False, 0.0, 0.0, False)


@functools.lru_cache(maxsize=256)
def _zeros_ones(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(count, dtype=dtype, device=device)
    return zeros, torch.ones_like(zeros)

"""BatchNorm statistics fused with the activation they are taken before, for GPUs.

What `batchnorm.c` does on a CPU, in Triton, which comes with PyTorch for CUDA: the sums for mean
and variance on the way forwards, and their gradient on the way back, in the passes over an
activation that are made anyway. Imported where there is such a GPU alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

MOST = 2**31 - 1
"""Values of a tensor whose places are numbers of 32 bits."""

_TILE, _BLOCK = 2048, 1024


# Compiled anew only for what says how values are aligned.
@triton.jit(do_not_specialize=["rows", "stride"])
def _forward_kernel(
    x, out, expected, sums, squares, rows, channels, stride,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, LOOPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    within = channel < channels
    about = tl.load(expected + channel, mask=within, other=0.0)
    first = tl.program_id(0) * (ROWS * LOOPS)
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    square = tl.zeros((CHANNELS,), dtype=tl.float32)
    for index in range(LOOPS):
        row = first + index * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & within[None, :]
        place = (group * rows + row)[:, None] * channels + channel[None, :]
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            active = value / (1.0 + tl.exp(-value))
            tl.store(out + place, active.to(out.dtype.element_ty), mask=mask)
        away = tl.where(mask, value - about[None, :], 0.0)
        total += tl.sum(away, 0)
        square += tl.sum(away * away, 0)
    tl.atomic_add(sums + group * stride + channel, total, mask=within)
    tl.atomic_add(squares + group * stride + channel, square, mask=within)


@triton.jit(do_not_specialize=["numel", "of_group", "channels", "stride"])
def _backward_kernel(
    x, grad, out, slope, offset, numel, of_group, channels, stride,
    BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < numel
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    through = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    where = (place // of_group) * stride + place % channels
    a = tl.load(slope + where, mask=mask, other=0.0)
    b = tl.load(offset + where, mask=mask, other=0.0)
    if SILU:
        gate = 1.0 / (1.0 + tl.exp(-value))
        through = through * gate * (1.0 + value * (1.0 - gate))
    result = through + a * value + b
    tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)


def fits(x: Tensor) -> bool:
    """Whether the kernels take `x`."""
    return (
        x.ndim == 4
        and x.dtype in (torch.float32, torch.bfloat16)
        and 0 < x.numel() <= MOST
        and x.is_contiguous(memory_format=torch.channels_last)
        and why_not(x.device) is None
    )


def sums(x: Tensor, expected: Tensor, total: Tensor, squares: Tensor, silu: bool) -> Tensor:
    """Add up what each channel of each group of images is away from expected, and the squares of
    that; `x`, or its SiLU.

    Args:
        x: `(groups * n, c, h, w)`, for which `fits` says yes.
        expected: float32 `(c,)`.
        total, squares: float32 `(groups, c)`, dense in c: where it is added.
        silu: whether to give silu(x), or x itself.
    """
    groups, channels = total.shape
    rows = x.numel() // channels // groups
    out = torch.empty_like(x) if silu else x
    width = min(triton.next_power_of_2(channels), 64)
    height = _TILE // width
    # Where rows are many, so would be those who wait to add to the same sums.
    loops = 16 if rows > 2**19 else 4
    grid = triton.cdiv(rows, height * loops), triton.cdiv(channels, width), groups
    _forward_kernel[grid](
        x, out, expected, total, squares, rows, channels, total.stride(0),
        ROWS=height, CHANNELS=width, LOOPS=loops, SILU=silu,
    )  # fmt: skip
    return out


def backward(x: Tensor, grad: Tensor, slope: Tensor, offset: Tensor, silu: bool) -> Tensor:
    """The gradient of `x`: what `grad` says, and `slope * x + offset`; see `moments_backward`.

    Args:
        x: `(groups * n, c, h, w)`, for which `fits` says yes.
        grad: of what `sums` gave.
        slope, offset: float32 `(groups, c)`, dense in c and of the same strides.
        silu: as then.
    """
    grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
    out, numel = torch.empty_like(x), x.numel()
    groups, channels = slope.shape
    _backward_kernel[(triton.cdiv(numel, _BLOCK),)](
        x, grad, out, slope, offset, numel, numel // groups, channels, slope.stride(0),
        BLOCK=_BLOCK, SILU=silu,
    )  # fmt: skip
    return out


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why the kernels are not used on a device, for people; None where they are.

    They are tried on a small tensor: a compiler may be missing, or of another opinion.
    """
    try:
        with torch.no_grad():
            off = max(_off(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    except Exception as error:  # whatever a compiler runs into
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None if off < 0.02 else f"its kernels are off by {off:g}"


def _off(device: torch.device, dtype: torch.dtype) -> float:
    """How far what the kernels give is from what PyTorch gives, at most."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    worst = 0.0
    for channels in (3, 80):
        x, grad = (
            drawn(4, channels, 9, 7).to(dtype).contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        )
        expected, factors = drawn(channels), drawn(2, 2, channels + 1)[..., :channels]
        channel_sums = torch.zeros(2, 2, channels + 1, device=device)[..., :channels]
        for silu in (False, True):
            channel_sums.zero_()
            out = sums(x, expected, channel_sums[0], channel_sums[1], silu)
            back = backward(x, grad, factors[0], factors[1], silu)
            parts = x.float().unflatten(0, (2, -1))
            away = parts - expected[:, None, None]
            wanted = torch.stack([away.sum((1, 3, 4)), away.square().sum((1, 3, 4))])
            through = torch.ops.aten.silu_backward(grad.float(), x.float()) if silu else grad
            linear = factors[0][:, None, :, None, None] * parts
            linear = linear + factors[1][:, None, :, None, None]
            pairs: list[tuple[Any, Any]] = [
                (channel_sums, wanted),
                (out, F.silu(x.float()) if silu else x),
                (back, through.float() + linear.flatten(0, 1)),
            ]
            for from_kernel, from_torch in pairs:
                apart = (from_kernel.float() - from_torch.float()).abs() / (
                    1 + from_torch.float().abs()
                )
                worst = max(worst, float(apart.max()))
    return worst

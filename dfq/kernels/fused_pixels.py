"""What is done to images themselves, in one pass each, for GPUs: what `pixels.c` does on a CPU.

In Triton, as `fused`. Imported where there is such a GPU alone.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _view_kernel(
    source, target, flipped, erased, height, width,
    source_n, source_c, source_h, source_w, target_n, target_c, target_h, target_w,
    BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Of the image, all places of the view, channels innermost.
    image = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < 3 * height * width
    channel = place % 3
    column = (place // 3) % width
    row = place // 3 // width
    turned = tl.load(flipped + image).to(tl.int32)
    mirrored_column = column + turned * (width - 1 - 2 * column)
    first_row = tl.load(erased + image * 4)
    last_row = tl.load(erased + image * 4 + 1)
    first_column = tl.load(erased + image * 4 + 2)
    last_column = tl.load(erased + image * 4 + 3)
    blank = (row >= first_row) & (row < last_row)
    blank = blank & (column >= first_column) & (column < last_column)
    if BACK:
        read, written = column, mirrored_column
    else:
        read, written = mirrored_column, column
    value = tl.load(
        source + image.to(tl.int64) * source_n + channel * source_c + row * source_h
        + read * source_w,
        mask=mask, other=0.0,
    ).to(tl.float32)  # fmt: skip
    value = tl.where(blank, 0.0, value)
    tl.store(
        target + image.to(tl.int64) * target_n + channel * target_c + row * target_h
        + written * target_w,
        value.to(target.dtype.element_ty), mask=mask,
    )  # fmt: skip


@triton.jit
def _variation_kernel(
    images, gradient, sums, height, width, BLOCK: tl.constexpr
):  # fmt: skip
    image = tl.program_id(1)
    plane = height * width
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < 3 * plane
    within = place % plane
    row, column = within // width, within % width
    base = images + image.to(tl.int64) * 3 * plane
    value = tl.load(base + place, mask=mask, other=0.0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for down in tl.static_range(-1, 2):
        for across in tl.static_range(-1, 2):
            inside = mask & (row + down >= 0) & (row + down < height)
            inside = inside & (column + across >= 0) & (column + across < width)
            near = tl.load(base + place + down * width + across, mask=inside, other=0.0)
            total += tl.where(inside, value - near, 0.0)
    tl.store(gradient + image.to(tl.int64) * 3 * plane + place, total, mask=mask)
    tl.atomic_add(sums + 2 * image, tl.sum(total * total, 0))
    tl.atomic_add(sums + 2 * image + 1, tl.sum(total * value, 0))


def view(pixels: Tensor, flipped: Tensor, erased: Tensor, dtype: torch.dtype) -> Tensor:
    """See `augmentation.augmented_view`; channels innermost.

    Args:
        pixels: float32 `(n, 3, h, w)`.
        flipped: bool `(n,)`.
        erased: int32 `(n, 4)`.
        dtype: of the result.
    """
    target = torch.empty_like(pixels, dtype=dtype, memory_format=torch.channels_last)
    return _run_view(pixels, target, flipped, erased, back=False)


def view_backward(grad: Tensor, flipped: Tensor, erased: Tensor) -> Tensor:
    """The gradient of `view`'s pixels, float32 `(n, 3, h, w)`, in planes."""
    target = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
    return _run_view(grad, target, flipped, erased, back=True)


def _run_view(
    source: Tensor, target: Tensor, flipped: Tensor, erased: Tensor, *, back: bool
) -> Tensor:
    count, _, height, width = source.shape
    grid = triton.cdiv(3 * height * width, _BLOCK), count
    _view_kernel[grid](
        source, target, flipped.contiguous().view(torch.uint8), erased.contiguous(), height, width,
        *source.stride(), *target.stride(), BACK=back, BLOCK=_BLOCK,
    )  # fmt: skip
    return target


def variation(images: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of half the sum of squared differences to the eight neighbours, and of each
    image float32 `(n, 2)`: that gradient's sum of squares, and its inner product with the image.

    Args:
        images: float32 `(n, 3, h, w)`, contiguous.
    """
    count, _, height, width = images.shape
    gradient = torch.empty_like(images)
    sums = torch.zeros(count, 2, device=images.device)
    grid = triton.cdiv(3 * height * width, _BLOCK), count
    _variation_kernel[grid](images, gradient, sums, height, width, BLOCK=_BLOCK)
    return gradient, sums


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why the kernels are not used on a device, for people; None where they are.

    They are tried on small images: a compiler may be missing, or of another opinion.
    """
    try:
        with torch.no_grad():
            off = _off(device)
    except Exception as error:  # whatever a compiler runs into
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None if off < 1e-3 else f"its kernels are off by {off:g}"


def _off(device: torch.device) -> float:
    """How far what the kernels give is from what PyTorch gives, at most."""
    from .plain import blanked, mirrored, plain_variation

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 20, 37, generator=generator).to(device)
    flipped = torch.tensor([True, False, True]).to(device)
    edges = [[2, 9, 30, 37], [0, 20, 0, 5], [7, -3, 2, 8]]
    erased = torch.tensor(edges, dtype=torch.int32).to(device)
    pairs = [
        (view(images, flipped, erased, torch.float32), blanked(mirrored(images, flipped), erased)),
        (view_backward(images, flipped, erased), mirrored(blanked(images, erased), flipped)),
    ]
    for layout in (torch.contiguous_format, torch.channels_last):
        laid_out = images.contiguous(memory_format=layout)
        pairs.append((view_backward(laid_out, flipped, erased), pairs[1][1]))
    gradient, sums = variation(images)
    wanted = plain_variation(images)
    inner_product = (images * wanted).sum((1, 2, 3))
    wanted_sums = torch.stack([wanted.square().sum((1, 2, 3)), inner_product], dim=1)
    pairs += [(gradient, wanted), (sums / wanted_sums, torch.ones_like(wanted_sums))]
    return max(float((from_kernel - from_torch).abs().max()) for from_kernel, from_torch in pairs)

"""What images start from, and what of them a network is shown in an iteration."""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..kernels.loader import fused_pixels, usable
from ..kernels.operations import OPERATIONS
from ..kernels.plain import blanked, mirrored


def initial_images(count: int, size: int, kind: str, generator: Generator) -> Tensor:
    """Noise `(count, 3, size, size)` in [0, 1]: uniform; Gaussian around the middle; or "pink",
    the same with amplitudes that fall with the frequency, as those of photographs do."""
    if kind == "uniform":
        return torch.rand(count, 3, size, size, generator=generator)
    noise = torch.randn(count, 3, size, size, generator=generator)
    if kind == "pink":
        across = torch.fft.rfftfreq(size)
        frequency = (torch.fft.fftfreq(size)[:, None].square() + across.square()).sqrt()
        frequency[0, 0] = math.inf
        noise = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(size, size))
        noise = noise / noise.std(dim=(1, 2, 3), keepdim=True)
    return (0.5 + 0.25 * noise).clamp_(0, 1)


def random_erasing(count: int, size: int, probability: float, generator: Generator) -> Tensor:
    """Rectangles to blank, of 2 to 20 % of the area with an aspect ratio of 0.3 to 3.3, one in each
    image that draws one (Zhong et al., 2020).

    Returns:
        int32 `(count, 4)`, pixels: first and last row, first and last column, the last ones not
        within; rows that end before they begin where an image drew none.
    """
    draw = torch.rand(5, count, generator=generator)
    area = 0.02 + 0.18 * draw[0]
    aspect = torch.exp((2 * draw[1] - 1) * math.log(3.3))
    height, width = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
    top, left = draw[2] * (1 - height), draw[3] * (1 - width)
    height = torch.where(draw[4] < probability, height, torch.full_like(height, -1.0))
    # Of the pixels whose centres lie within.
    edges = torch.stack([top, top + height, left, left + width], dim=1)
    return edges.mul_(size).sub_(0.5).ceil_().int()


def augmented_view(
    pixels: Tensor,
    flipped: Tensor | None,
    erased: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What the network is shown of images: mirrored, then partly blanked; differentiable.

    On a CPU the channels of what it is shown are innermost, as convolutions want them.

    Args:
        pixels: the images, float32 `(n, 3, h, w)`.
        flipped: bool `(n,)`, which of them are mirrored; None: none.
        erased: see `random_erasing`, of the mirrored images; None: nothing.
        dtype: of the result.
    """
    return _Shown.apply(pixels, flipped, erased, dtype)


class _Shown(torch.autograd.Function):
    """One pass each way, and nothing kept or added up in between."""

    @staticmethod
    def forward(
        ctx: Any, pixels: Tensor, flipped: Tensor | None, erased: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(flipped, erased)
        kernels = fused_pixels(pixels.device)
        if kernels is not None and _takes(pixels):
            return cast(Tensor, kernels.view(pixels, *_drawn(pixels, flipped, erased), dtype))
        if not (pixels.is_contiguous() and _compiled(pixels)):
            return blanked(mirrored(pixels, flipped), erased).to(dtype)
        view = torch.empty_like(pixels, dtype=dtype, memory_format=torch.channels_last)
        OPERATIONS["view"](pixels, view, *_drawn(pixels, flipped, erased))
        return view

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        flipped, erased = ctx.saved_tensors
        kernels = fused_pixels(grad.device)
        if kernels is not None and _takes(grad):
            made = cast(Tensor, kernels.view_backward(grad, *_drawn(grad, flipped, erased)))
            return made, None, None, None
        if not _compiled(grad):
            grad = grad.to(torch.float32, memory_format=torch.contiguous_format)
            return mirrored(blanked(grad, erased), flipped), None, None, None
        grad = grad.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(grad, dtype=torch.float32, memory_format=torch.contiguous_format)
        OPERATIONS["view_backward"](grad, out, *_drawn(grad, flipped, erased))
        return out, None, None, None


def _takes(images: Tensor) -> bool:
    return images.ndim == 4 and images.shape[1] == 3 and images[0].numel() < 2**31


def _compiled(images: Tensor) -> bool:
    return images.ndim == 4 and images.shape[1] == 3 and usable(images)


def _drawn(images: Tensor, flipped: Tensor | None, erased: Tensor | None) -> tuple[Tensor, Tensor]:
    """What was drawn as the compiled functions take it, and the kernels."""
    no_flips, no_rectangles = nothing_drawn(len(images), images.device)
    flipped = no_flips if flipped is None else flipped
    return flipped.contiguous(), (no_rectangles if erased is None else erased).contiguous()


@functools.lru_cache(maxsize=16)
def nothing_drawn(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `augmented_view` is given where nothing is drawn; to be asked for before anything is
    recorded on a device, and kept."""
    no_rectangles = torch.zeros(count, 4, dtype=torch.int32, device=device)
    return torch.zeros(count, dtype=torch.bool, device=device), no_rectangles


def resized(images: Tensor, size: int) -> Tensor:
    """`images` `(n, 3, k, k)` at another side."""
    if images.shape[2] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)

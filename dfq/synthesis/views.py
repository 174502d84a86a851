"""What images start from, and what of them a network is shown in an iteration."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


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


def random_erasing_mask(count: int, size: int, probability: float, generator: Generator) -> Tensor:
    """1 to keep, 0 to blank: `(count, 1, size, size)`, one rectangle of 2 to 20 % of the area with
    an aspect ratio of 0.3 to 3.3 in each image that draws one (Zhong et al., 2020)."""
    draw = torch.rand(5, count, generator=generator)
    area = 0.02 + 0.18 * draw[0]
    aspect = torch.exp((2 * draw[1] - 1) * math.log(3.3))
    height, width = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
    top, left = draw[2] * (1 - height), draw[3] * (1 - width)
    height = torch.where(draw[4] < probability, height, torch.full_like(height, -1.0))
    # Of the pixels whose centres lie within.
    edges = torch.stack([top, top + height, left, left + width]).mul_(size).sub_(0.5).ceil_()
    mask = torch.ones(count, 1, size, size)
    for image, (first, last, begin, end) in zip(mask, edges.T.int().tolist(), strict=True):
        image[:, first : max(first, last), begin:end] = 0
    return mask


class Augmented(torch.autograd.Function):
    """Flips and erases images: the chain of `where`, `flip` and product, without what autograd
    would keep and add up in between."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, flipped: Tensor | None, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(flipped, kept)
        view = _flip(pixels, flipped)
        return view if kept is None else view * kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        flipped, kept = ctx.saved_tensors
        grad = grad.contiguous()
        return _flip(grad if kept is None else grad * kept, flipped), None, None


def _flip(images: Tensor, flipped: Tensor | None) -> Tensor:
    """`images` `(n, c, h, w)`, mirrored where `flipped` `(n,)` says so."""
    if flipped is None:
        return images.view_as(images)
    if images.device.type != "cpu":
        return torch.where(flipped[:, None, None, None], images.flip(3), images)
    mirrored = images.clone(memory_format=torch.contiguous_format)
    mirrored[flipped] = images[flipped].flip(3)
    return mirrored


def resized(images: Tensor, size: int) -> Tensor:
    """`images` `(n, 3, k, k)` at another side."""
    if images.shape[2] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)

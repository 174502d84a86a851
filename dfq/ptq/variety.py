"""Images of other colours and contrast, for rounding to see beside the set.

GPTQ makes up for each error of rounding where the images have something and lets it go where they
have nothing. Synthetic images have the light and the colours that the network was trained on, and
images of another world have others: to a network of grey images, coloured ones. A few copies that
are off by far let no error go unseen. That costs some of what is kept in the world that the network
was made for (docs/results/networks.md), so it has to be asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ..models.base import Model
from ..quantization.settings import Quantization

SHARE = 4
"""Of so many images one has a copy."""

MIXING = 0.3
"""Standard deviation of how much of each colour goes into each other one, and more or less of it
into itself."""

WEAKEST, STRONGEST = math.exp(-0.7), math.exp(0.9)
"""Contrast of a copy, as a factor, at least and at most."""

LIGHT, GAIN = 0.25, 0.4
"""How much lighter or darker a copy is at most, and the standard deviation of a factor of each
colour."""


def with_variety(images: Tensor) -> Tensor:
    """A set, and behind it copies of its first images in other colours, contrast and light.

    Args:
        images: uint8 `(n, 3, h, w)`.

    Returns:
        uint8 `(n + ceil(n / SHARE), 3, h, w)`, the same for the same images.

    Example:
        >>> with_variety(torch.zeros(64, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([80, 3, 32, 32])
    """
    count = copies(len(images))
    generator = Generator().manual_seed(0)

    def draw(*shape: int, uniform: bool = False) -> Tensor:
        make = torch.rand if uniform else torch.randn
        return make(count, *shape, generator=generator).to(images.device)

    mixed = torch.eye(3, device=images.device) + MIXING * draw(3, 3)
    low, high = math.log(WEAKEST), math.log(STRONGEST)
    contrast = (low + (high - low) * draw(1, 1, 1, uniform=True)).exp()
    light = LIGHT * (2 * draw(1, 1, 1, uniform=True) - 1)
    gain = 1 + GAIN * draw(3, 1, 1)

    pixels = images[:count].float() / 255
    seen = torch.matmul(mixed, (pixels - 0.5).flatten(2)).view_as(pixels) + 0.5
    mean = seen.mean(dim=(1, 2, 3), keepdim=True)
    seen = ((seen - mean) * contrast + mean + light) * gain
    return torch.cat([images, (seen.clamp_(0, 1) * 255).round_().to(images.dtype)])


def copies(images: int) -> int:
    """How many copies `with_variety` adds to so many images."""
    return math.ceil(images / SHARE)


def sees_other_worlds(model: Model, section: Quantization) -> bool:
    """Whether a model's rounding looks at copies as well."""
    return section.other_worlds and model.task == "detection"

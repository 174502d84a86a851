"""The floor that synthesis is measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfq.models.base import Model


def bare_pass(detector: Model, images: Tensor, precision: str) -> Callable[[], Tensor]:
    """One forward and input-gradient backward pass; nothing can invert a network with less.

    Args:
        detector: frozen, on the device of the images.
        images: float32 `(n, 3, s, s)`.
        precision: "bfloat16", or anything else for float32.

    Returns:
        Gives the gradient of the sum of all outputs, of the shape of `images`.
    """
    half = precision == "bfloat16"

    def run() -> Tensor:
        pixels = images.clone(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            levels = detector.levels(detector.raw(pixels))
        ones = [torch.ones_like(level) for level in levels]
        return torch.autograd.grad(levels, pixels, ones)[0]

    return run

"""To coarser grids of pixels and back."""

from __future__ import annotations

from torch import Tensor

from .loader import usable_planes
from .operations import OPERATIONS
from .plain import plain_doubled, plain_halved


def halved(images: Tensor) -> Tensor:
    """Sums of blocks of 2 by 2: `(n, c, h / 2, w / 2)` of `(n, c, h, w)`, h and w even."""
    if not usable_planes(images):
        return plain_halved(images)
    count, channels, height, width = images.shape
    out = images.new_empty(count, channels, height // 2, width // 2)
    OPERATIONS["halved"](images, out)
    return out


def add_doubled(grid: Tensor, out: Tensor) -> Tensor:
    """Adds to `out` `(n, c, 2 h, 2 w)`, in place, the grid `(n, c, h, w)` enlarged bilinearly."""
    if not (usable_planes(grid) and usable_planes(out)):
        return out.add_(plain_doubled(grid))
    OPERATIONS["add_doubled"](grid, out)
    return out

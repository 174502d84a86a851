"""What the kernels compute, by PyTorch's operations: in their place, and to check them against."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def mirrored(images: Tensor, flipped: Tensor | None) -> Tensor:
    """Images `(n, 3, h, w)`, those of them mirrored where the boolean `flipped` `(n,)` is true."""
    if flipped is None:
        return images.view_as(images)
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


def blanked(images: Tensor, erased: Tensor | None) -> Tensor:
    """Images `(n, 3, h, w)` with zeros in the rectangles `erased`, int32 `(n, 4)`: first and last
    row, first and last column, the last ones excluded."""
    if erased is None:
        return images
    first_row, last_row, first_column, last_column = erased.T[..., None]
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    down = (first_row <= rows) & (rows < last_row)
    across = (first_column <= columns) & (columns < last_column)
    return images.masked_fill((down[:, :, None] & across[:, None])[:, None], 0)


def plain_variation(images: Tensor) -> Tensor:
    """The gradient of `squared_variation` alone: `(n, 3, h, w)`, as the images."""
    padded = F.pad(images, (1, 1, 1, 1))
    rows = padded[:, :, :-2] + padded[:, :, 1:-1]
    rows += padded[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1]
    around += rows[..., 2:]
    return torch.addcmul(
        around, images, neighbours(*images.shape[2:], images.device), value=-1
    ).neg_()


@functools.lru_cache(maxsize=16)
def neighbours(height: int, width: int, device: torch.device) -> Tensor:
    """Of each pixel, itself among them: `(h, w)`."""
    down = torch.full((height, 1), 3.0, device=device)
    across = torch.full((1, width), 3.0, device=device)
    # Fewer at the border; a side of one pixel has none.
    down[0] -= 1
    down[-1] -= 1
    across[:, 0] -= 1
    across[:, -1] -= 1
    return down * across


def plain_halved(images: Tensor) -> Tensor:
    """Sums of blocks of 2 by 2; on a CPU in a seventh of the time of `avg_pool2d`."""
    rows = images[:, :, ::2] + images[:, :, 1::2]
    return rows[..., ::2] + rows[..., 1::2]


def plain_doubled(grid: Tensor) -> Tensor:
    """A grid enlarged bilinearly to twice its sides."""
    # With channels innermost it takes half of the time on a CPU.
    inner = grid.contiguous(memory_format=torch.channels_last)
    return F.interpolate(inner, scale_factor=2, mode="bilinear")

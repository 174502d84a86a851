"""Augmentation of calibration batches, on the device, for all images of a batch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..models.base import Targets


def mosaic(images: Tensor, targets: Targets, generator: Generator) -> tuple[Tensor, Targets]:
    """Each image becomes four of the batch at half their size, in the corners of a square.

    Objects come out half as large and in new company: a small set then shows the network more.

    Args:
        images: `(n, 3, h, w)`, h and w even.
        targets: their labels.
        generator: draws which four, the image itself always among them.
    """
    count = len(images)
    small = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    orders = [torch.arange(count)]
    orders += [torch.randperm(count, generator=generator) for _ in range(3)]
    quarters = [small[order.to(images.device)] for order in orders]
    tiled = torch.cat([torch.cat(quarters[:2], dim=3), torch.cat(quarters[2:], dim=3)], dim=2)
    rows = []
    for place, order in enumerate(orders):
        # Image order[i] goes into mosaic i: an image's labels move to where it went.
        went_to = torch.empty_like(order)
        went_to[order] = torch.arange(count)
        data = targets.data.clone()
        data[:, 0] = went_to.to(data.device)[data[:, 0].long()].to(data.dtype)
        data[:, 2:] = data[:, 2:] / 2
        data[:, 2] += 0.5 * (place % 2)
        data[:, 3] += 0.5 * (place // 2)
        rows.append(data)
    return tiled, Targets(torch.cat(rows))


def jitter_colours(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """Scale and shift each channel of images `(n, 3, h, w)` in [0, 1] by up to `strength` and a
    half of it."""
    draw = 2 * torch.rand(2, len(images), 3, 1, 1, generator=generator) - 1
    gain, shift = (1 + strength * draw[0]).to(images.device), (strength / 2 * draw[1])
    return (images * gain + shift.to(images.device)).clamp(0, 1)


def augment(
    images: Tensor, targets: Targets, generator: Generator, *, flip: float, zoom: float
) -> tuple[Tensor, Targets]:
    """Mirror and zoom a batch at random, labels with it.

    Args:
        images: float `(n, 3, h, w)` in [0, 1].
        targets: their labels.
        generator: on the CPU; what is drawn does not depend on the device.
        flip: probability of a mirrored image.
        zoom: images are scaled by a factor in [1 - zoom, 1 + zoom] about a random point; what
            comes in from outside is grey (114 / 255), as letterboxing pads.

    Returns:
        New images and labels; boxes are clipped, those that all but leave the image are dropped.
    """
    count = len(images)
    draw = torch.rand(4, count, generator=generator).to(images.device)
    flipped = draw[0] < flip
    if flip > 0:
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        targets = targets.flip_horizontal(flipped)
    if zoom <= 0:
        return images, targets
    factor = 1 + zoom * (2 * draw[1] - 1)
    # In output coordinates x' = factor * x + shift; the image is kept from leaving the frame.
    shift_x, shift_y = draw[2] * (1 - factor), draw[3] * (1 - factor)
    theta = torch.zeros(count, 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / factor
    # affine_grid works on [-1, 1]: u = 2x - 1 of the source as a function of the output's.
    theta[:, 0, 2] = (1 - 2 * shift_x) / factor - 1
    theta[:, 1, 2] = (1 - 2 * shift_y) / factor - 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    grey = 114 / 255
    images = F.grid_sample(images - grey, grid, mode="bilinear", align_corners=False) + grey
    data = targets.data
    index = data[:, 0].long()
    scale = factor[index, None]
    offset = torch.stack([shift_x, shift_y], dim=1)[index]
    centre, half = data[:, 2:4] * scale + offset, data[:, 4:6] * scale / 2
    low, high = (centre - half).clamp(0, 1), (centre + half).clamp(0, 1)
    seen = ((high - low) > 0.25 * (2 * half)).all(dim=1)
    moved = torch.cat([data[:, :2], (low + high) / 2, high - low], dim=1)
    return images, Targets(moved[seen])

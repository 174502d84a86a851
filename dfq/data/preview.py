"""A picture of a set: a grid of its images with boxes and category names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, make_grid

from ..errors import shown
from ..models.classifying import whole_image
from ..runtime.files import write_atomic
from .calibration_set import CalibrationSet
from .class_set import ClassSet
from .image_set import ImageSet
from .letterbox import letterbox, load_letterboxed

# Distinct on most backgrounds, repeated in this order over the categories.
_COLOURS = ("#ff3838", "#48f90a", "#00d4ff", "#ffb21d", "#ff37c7", "#cfd231", "#8438ff", "#92cc17")

_SIDE = 320
"""Pixels of the squares in which images of a real set are shown."""


def draw_grid(
    images: Tensor, labels: Sequence[Tensor], names: Sequence[str], columns: int = 4
) -> Tensor:
    """A grid of images with their labels.

    Args:
        images: uint8 `(n, 3, s, s)`.
        labels: per image `(n_i, 5)`: category, cx, cy, w, h in [0, 1].
        names: category names.
        columns: images a row.

    Returns:
        uint8 `(3, H, W)`.
    """
    side = images.shape[2]
    # Small images are enlarged first, or the names would cover them.
    factor = max(1, round(320 / side))
    enlarged = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    drawn = []
    for image, label in zip(enlarged, labels, strict=True):
        if len(label):
            half = label[:, 3:] / 2
            corners = torch.cat([label[:, 1:3] - half, label[:, 1:3] + half], dim=1)
            categories = [int(c) for c in label[:, 0]]
            image = draw_bounding_boxes(
                image,
                (corners * side * factor).clamp(0, side * factor - 1),
                [shown(names[c], limit=40) for c in categories],
                [_COLOURS[c % len(_COLOURS)] for c in categories],
                width=2,
            )
        drawn.append(image)
    return make_grid(drawn, nrow=columns, padding=4, pad_value=255)


def draw_preview(data: CalibrationSet | ImageSet | ClassSet, count: int = 16) -> bytes:
    """The first `count` images of a set as a grid, a PNG file; those of a real set in squares."""
    indices = list(range(min(count, len(data))))
    if isinstance(data, ClassSet):
        squares = [letterbox(data.load_image(i), _SIDE, _SIDE, rect=False)[0] for i in indices]
        images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
        labels = [whole_image(torch.tensor([data.files[i][1]])) for i in indices]
    elif isinstance(data, ImageSet):
        pixels, targets, _ = load_letterboxed(data, indices, _SIDE, _SIDE)
        images = (pixels * 255).round().to(torch.uint8)
        labels = targets.per_image(len(indices))
    else:
        images, labels = data.load(indices), [data.labels[i] for i in indices]
    grid = draw_grid(images, labels, data.names)
    drawn = np.ascontiguousarray(grid.permute(1, 2, 0).numpy()[:, :, ::-1])
    return cv2.imencode(".png", drawn)[1].tobytes()


def write_preview(data: CalibrationSet, path: Path, count: int = 16) -> None:
    """Write `draw_preview` to a file."""
    write_atomic(path, draw_preview(data, count))

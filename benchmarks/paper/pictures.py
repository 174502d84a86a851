"""Sheets of images with boxes: rows with a title each, columns with or without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from dfq.data.drawing import INK, PAPER, draw_boxes, font
from dfq.errors import shown
from dfq.models.base import Detections
from dfq.synthesis.labels import to_corners

SIDE = 280
"""Pixels of a tile's side."""

MOST_BOXES = 8
"""In a tile: those that come first."""

_GAP, _TEXT, _TAG = 6, 17, 13
"""Pixels between tiles, and heights of titles and of tags."""

_LONGEST_TAG = 16
"""Letters of a category's name."""


@dataclass(frozen=True)
class Tile:
    """An image with boxes.

    Attributes:
        pixels: uint8 `(h, w, 3)`, RGB.
        boxes: `(n, 4)`, x1 y1 x2 y2 in [0, 1], the most important first.
        categories: of each box.
        tags: of each box.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    categories: Sequence[int]
    tags: Sequence[str]


def labelled(pixels: Tensor, labels: Tensor, names: Sequence[str]) -> Tile:
    """An image with its labels, the largest first.

    Args:
        pixels: uint8 `(3, s, s)`.
        labels: `(n, 5)`: category, cx, cy, w, h in [0, 1].
        names: of the categories.
    """
    order = labels[:, 3:].prod(dim=1).argsort(descending=True)
    categories = labels[order, 0].long().tolist()
    boxes = to_corners(labels[order, 1:]).double().numpy()
    tags = [shown(names[category], limit=_LONGEST_TAG) for category in categories]
    return Tile(pixels.permute(1, 2, 0).numpy(), boxes, categories, tags)


def detected(pixels: np.ndarray, found: Detections, names: Sequence[str], above: float) -> Tile:
    """An image with what was detected in it, the surest first.

    Args:
        pixels: uint8 `(h, w, 3)`.
        found: on the CPU, boxes in pixels.
        names: of the categories.
        above: the least score that is drawn.
    """
    height, width = pixels.shape[:2]
    rows = found.scores.argsort(descending=True)
    rows = rows[found.scores[rows] > above]
    categories, scores = found.labels[rows].tolist(), found.scores[rows].tolist()
    tags = [
        f"{shown(names[category], limit=_LONGEST_TAG)} {score:.2f}"
        for category, score in zip(categories, scores, strict=True)
    ]
    boxes = found.boxes[rows].double().numpy() / np.array([width, height] * 2)
    return Tile(pixels, boxes, categories, tags)


def _drawn(tile: Tile) -> Image.Image:
    """A square with the image in its middle."""
    height, width = tile.pixels.shape[:2]
    factor = SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image = Image.fromarray(tile.pixels).resize(size, Image.Resampling.BICUBIC)
    chosen = slice(0, MOST_BOXES)
    draw_boxes(
        image,
        tile.boxes[chosen] * np.array([*size, *size]),
        tile.categories[chosen],
        tile.tags[chosen],
        text_size=_TAG,
    )
    square = Image.new("RGB", (SIDE, SIDE), PAPER)
    square.paste(image, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return square


def sheet(rows: Sequence[tuple[str, Sequence[Tile]]], columns: Sequence[str] = ()) -> Image.Image:
    """Rows of tiles.

    Args:
        rows: title, which stands above, and tiles of each.
        columns: titles above the first row; none by default.
    """
    letters, above = font(_TEXT), round(1.7 * _TEXT)
    across = max(len(tiles) for _, tiles in rows)
    top = above if columns else 0
    width = across * (SIDE + _GAP) + _GAP
    titled = [bool(title) for title, _ in rows]
    height = top + len(rows) * (SIDE + _GAP) + sum(titled) * above + _GAP
    paper = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(paper)
    for place, title in enumerate(columns):
        pen.text((_GAP + place * (SIDE + _GAP), _GAP), title, INK, letters)
    y = top + _GAP
    for title, tiles in rows:
        if title:
            pen.text((_GAP, y + _TEXT // 4), title, INK, letters)
            y += above
        for place, tile in enumerate(tiles):
            paper.paste(_drawn(tile), (_GAP + place * (SIDE + _GAP), y))
        y += SIDE + _GAP
    return paper


def save(picture: Image.Image, file: Path) -> None:
    """As a JPEG, with colours at full resolution: letters and lines are thin."""
    picture.save(file, "JPEG", quality=88, subsampling=0)

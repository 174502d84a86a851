"""Boxes on images, each with a tag that can be read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = (
    *("#d7263d", "#1f6fd0", "#23862b", "#b8530f", "#8338ec"),
    *("#00798c", "#b5179e", "#6b6f00", "#7a4419", "#30425f"),
)
"""White text is legible on each; repeated in this order over the categories."""

INK, FAINT, PAPER = "#1b1f24", "#57606a", "#ffffff"

Place = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""


def colour(category: int) -> str:
    """Of a category, as "#rrggbb"."""
    return COLOURS[category % len(COLOURS)]


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """The font of pictures, `size` pixels high."""
    return ImageFont.load_default(size)


def tag_height(text_size: int) -> int:
    """Pixels that a tag is high whose text is `text_size` high."""
    return round(1.4 * text_size)


def draw_boxes(
    image: Image.Image,
    boxes: np.ndarray,
    labels: Sequence[int],
    texts: Sequence[str],
    *,
    text_size: int,
    room: tuple[int, int] | None = None,
) -> None:
    """Draw boxes with their tags into an image; tags keep clear of each other where they can.

    Args:
        image: RGB.
        boxes: `(n, 4)`, x1 y1 x2 y2 in pixels, the most important first.
        labels: of each box its category.
        texts: of each box its tag.
        text_size: height of the text in pixels; the lines' width goes with it.
        room: width and height that boxes may take; None: the image's. Tags may take all of it.
    """
    pen, letters = ImageDraw.Draw(image), font(text_size)
    width, height = room or image.size
    corners = boxes.clip(0, [width - 1, height - 1] * 2)
    edge, line = round(0.3 * text_size), max(2, round(0.23 * text_size))
    for box, label in reversed(list(zip(corners, labels, strict=True))):
        pen.rectangle([*box], outline=colour(label), width=line)
    occupied: list[Place] = []
    for box, label, text in zip(corners, labels, texts, strict=True):
        size = (pen.textlength(text, letters) + 2 * edge, tag_height(text_size))
        place = place_tag(box, size, image.size, occupied)
        occupied.append(place)
        pen.rectangle(place, fill=colour(label))
        pen.text((place[0] + edge, place[1] + text_size // 13), text, PAPER, letters)


def place_tag(
    box: np.ndarray | Sequence[float],
    tag: tuple[float, float],
    image: tuple[float, float],
    occupied: Sequence[Place],
) -> Place:
    """Where the tag of a box covers no other tag, if there is such a place at its edges.

    Args:
        box: `(4,)`, x1 y1 x2 y2 in pixels.
        tag: its width and height.
        image: width and height of the image, which no tag leaves unless it is the larger.
        occupied: where tags are already.
    """
    x1, y1, x2, y2 = map(float, box)
    width, height = tag
    places = []
    for y in (y1 - height, y2, y1, y2 - height):
        for x in (x1, x2 - width):
            left = max(0.0, min(x, image[0] - 1 - width))
            above = max(0.0, min(y, image[1] - 1 - height))
            places.append((left, above, left + width, above + height))
    free = [place for place in places if not any(meet(place, tag_place) for tag_place in occupied)]
    return (free or places)[0]


def meet(first: Place, second: Place) -> bool:
    """Whether two places overlap."""
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )

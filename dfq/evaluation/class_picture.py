"""Pictures of what classifiers say: an image, and beneath it the likeliest categories as bars."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ..data.drawing import INK, PAPER, colour, font
from ..errors import shown
from .class_prediction import ClassPrediction
from .prediction_picture import enlarged, titled

_NARROWEST = 320
"""Pixels that rows of text take, at least."""


def draw_classes(
    pixels: np.ndarray, prediction: ClassPrediction, title: str | None = None
) -> Image.Image:
    """An image with the likeliest categories and their probabilities.

    Args:
        pixels: uint8 `(height, width, 3)`, RGB, the image of `prediction`.
        prediction: what is said of it.
        title: stands above; None for none.
    """
    image, _ = enlarged(pixels)
    text_size = max(14, round(max(image.size) / 40))
    letters, row = font(text_size), round(1.6 * text_size)
    rows = prediction.top()
    width = max(image.width, _NARROWEST)
    sheet = Image.new("RGB", (width, image.height + row * len(rows) + text_size), PAPER)
    sheet.paste(image, ((width - image.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    top = image.height + text_size // 2
    for name, label, probability in rows:
        text = f"{shown(name, limit=40)} {probability:.3f}"
        # A bar below each line of text, which stays legible.
        length = round(probability * (width - 2 * text_size))
        pen.text((text_size, top), text, INK, letters)
        bar = top + round(1.25 * text_size)
        pen.rectangle((text_size, bar, text_size + length, bar + text_size // 5), colour(label))
        top += row
    return sheet if title is None else titled(sheet, title, text_size)

"""The demo's picture: what both networks detect on unseen scenes, and the synthetic images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..data.calibration_set import CalibrationSet
from ..data.drawing import FAINT, INK, PAPER, draw_boxes, font
from ..data.image_set import ImageSet
from ..models.base import Detections

SHOWN_SCORE = 0.3
"""Detections that are not above are not drawn, nor labels of which the network is less sure."""

_TILE = 300
_GAP = 8
_MARGIN = 28
_BETWEEN = 32
"""Pixels: an image's side, the gap within a pair, the edge, and the gap between pairs and parts."""

_SYNTHETIC = 5
"""Synthetic images in the row."""

_TITLE = "A detector in 8 bits, made without its training data"

_SHOWN = f"boxes: detections with a score above {SHOWN_SCORE}"
_MADE = "What the INT8 file was made from: images synthesized out of the float one, with labels"


@dataclass(frozen=True)
class Column:
    """One network's side of every pair.

    Attributes:
        title: what it is.
        figure: how good it is.
        detections: its own, one an image of the scenes, in their pixels.
    """

    title: str
    figure: str
    detections: Sequence[Detections]


def draw_picture(
    scenes: ImageSet,
    indices: Sequence[int],
    columns: tuple[Column, Column],
    made: CalibrationSet,
) -> Image.Image:
    """Scenes in pairs, two a row, with each network's detections; below, synthetic images.

    Args:
        scenes: the images.
        indices: which are shown, an even number.
        columns: left and right side of each pair.
        made: the synthetic set, of at least one image.
    """
    rows = len(indices) // 2
    pair = 2 * _TILE + _GAP
    width = 2 * _MARGIN + 2 * pair + _BETWEEN
    top = 76
    header, caption = 52, 40
    below = top + header + rows * (_TILE + _GAP) + _BETWEEN - _GAP
    sheet = Image.new("RGB", (width, below + caption + _TILE + _MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 24), _TITLE, INK, font(28))
    pen.text((width - _MARGIN, 34), _SHOWN, FAINT, font(15), anchor="ra")
    for number, index in enumerate(indices):
        row, side = divmod(number, 2)
        for place, column in enumerate(columns):
            x = _MARGIN + side * (pair + _BETWEEN) + place * (_TILE + _GAP)
            if row == 0:
                pen.text((x, top), column.title, INK, font(17))
                pen.text((x, top + 23), column.figure, FAINT, font(15))
            image = _scene(scenes.load_image(index), column.detections[index], scenes.names)
            sheet.paste(image, (x, top + header + row * (_TILE + _GAP)))
    pen.text((_MARGIN, below), _MADE, INK, font(17))
    side = (width - 2 * _MARGIN - (_SYNTHETIC - 1) * _GAP) // _SYNTHETIC
    for number, index in enumerate(_with_labels(made)):
        corner = (_MARGIN + number * (side + _GAP), below + caption)
        sheet.paste(_synthetic(made, index, side), corner)
    return sheet.crop((0, 0, width, below + caption + side + _MARGIN))


def _with_labels(made: CalibrationSet) -> list[int]:
    """The first images of a set that have a label to be drawn, or else just the first."""
    sure = [index for index, scores in enumerate(made.scores) if bool((scores > SHOWN_SCORE).any())]
    rest = [index for index in range(len(made)) if index not in set(sure)]
    return (sure + rest)[:_SYNTHETIC]


def _scene(pixels: np.ndarray, detections: Detections, names: Sequence[str]) -> Image.Image:
    """A scene as a tile, with boxes, categories and scores."""
    shown = detections.scores > SHOWN_SCORE
    height, width = pixels.shape[:2]
    boxes = detections.boxes[shown].numpy() / np.array([width, height] * 2)
    labels = detections.labels[shown].tolist()
    texts = [
        f"{names[label]} {score:.2f}"
        for label, score in zip(labels, detections.scores[shown].tolist(), strict=True)
    ]
    return _tile(pixels, _TILE, boxes, labels, texts)


def _synthetic(made: CalibrationSet, index: int, side: int) -> Image.Image:
    """A synthetic image with those of its labels that the network is sure of."""
    pixels = made.load([index])[0].permute(1, 2, 0).numpy()
    order = made.scores[index].argsort(descending=True, stable=True)
    rows = made.labels[index][order[made.scores[index][order] > SHOWN_SCORE]].numpy()
    half = rows[:, 3:] / 2
    boxes = np.concatenate([rows[:, 1:3] - half, rows[:, 1:3] + half], axis=1)
    labels = rows[:, 0].astype(int).tolist()
    return _tile(pixels, side, boxes, labels, [made.names[label] for label in labels])


def _tile(
    pixels: np.ndarray, side: int, boxes: np.ndarray, labels: Sequence[int], texts: Sequence[str]
) -> Image.Image:
    """An image as a square, with boxes and tags.

    Args:
        pixels: uint8 `(h, w, 3)`, RGB.
        side: of the square, pixels.
        boxes: `(n, 4)`, x1 y1 x2 y2 in [0, 1], the most important first.
        labels: of each box its category.
        texts: of each box its tag.
    """
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
    draw_boxes(image, boxes * side, labels, texts, text_size=13)
    return image

"""Images with boxes: the pixels as a JPEG in the page, boxes and tags as vectors over them."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageFont
from torch import Tensor

from ..data.calibration_set import CalibrationSet
from ..data.drawing import COLOURS, Place, place_tag
from ..data.image_set import ImageSet
from ..data.letterbox import load_letterboxed
from ..data.pixels import LabelledImages
from ..data.training_images import LetterboxedImages
from ..evaluation.agreement import REFERENCE_SCORE
from ..evaluation.coco import predict
from ..models.base import Detections, Detector
from .formats import text

TILES = 12
"""Images of the set that are shown."""

PAIRS = 6
"""Images that are shown with both networks' detections."""

LOOKED_AT = 8
"""Images that are searched for some with detections."""

MOST_BOXES = 12
"""Boxes in one image, the surest."""

_EMBEDDED = 320
"""Pixels of the long side of what is embedded."""

_WIDTH, _TALLEST = 240, 360
"""Of a tile, in its own units: as many pixels as it has on a screen, or somewhat more than on a
phone, so that tags can be read. Taller images stand in the middle."""

_LONGEST_TAG = 20
"""Letters of a category's name."""

_TAG_HEIGHT, _FONT = 19, 14
"""Of tags, in units of the tile."""


@dataclass(frozen=True)
class Box:
    """A box over a tile, in its units.

    Attributes:
        x, y, width, height: of the box.
        colour: of box and tag.
        tag: what it says, shortened; empty: no tag.
        tag_x, tag_y, tag_width: left, top and width of the tag.
    """

    x: float
    y: float
    width: float
    height: float
    colour: str
    tag: str = ""
    tag_x: float = 0.0
    tag_y: float = 0.0
    tag_width: float = 0.0


@dataclass(frozen=True)
class Tile:
    """An image as the page shows it.

    Attributes:
        data: a `data:` address of a JPEG.
        width, height: of the tile, in units of its own.
        left, across: where in it the image begins, and how wide that is.
        boxes: over it, the surest last.
        words: what is in it, for those who do not see it.
        more: boxes that are not drawn.
        caption: below it.
    """

    data: str
    width: int
    height: int
    left: float
    across: float
    boxes: list[Box]
    words: str
    more: int = 0
    caption: str = ""


@dataclass(frozen=True)
class Pair:
    """What two networks detect in one image."""

    before: Tile
    after: Tile


def tile(
    pixels: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    scores: Sequence[float],
    names: Sequence[str],
    *,
    with_scores: bool,
) -> Tile:
    """An image with boxes.

    Args:
        pixels: uint8 `(h, w, 3)`, RGB.
        boxes: `(n, 4)`, x1 y1 x2 y2 in [0, 1].
        labels, scores: of each box.
        names: of the categories.
        with_scores: whether tags say the score.
    """
    image = Image.fromarray(pixels)
    height = min(_TALLEST, max(1, round(_WIDTH * image.height / image.width)))
    across = min(float(_WIDTH), height * image.width / image.height)
    left = (_WIDTH - across) / 2
    factor = _EMBEDDED / max(image.size)
    embedded = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    image = image.resize(embedded, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    sides, corner = np.array([across, height] * 2), np.array([left, 0.0] * 2)
    # Of a network that has diverged.
    rows = [i for i, row in enumerate(boxes) if np.isfinite(row).all() and np.isfinite(scores[i])]
    order = sorted(rows, key=lambda index: -scores[index])
    drawn, tag_places, words = [], list[Place](), []
    for index in order[:MOST_BOXES]:
        x1, y1, x2, y2 = (boxes[index].clip(0, 1) * sides + corner).tolist()
        name = text(names[labels[index]], _LONGEST_TAG)
        tag = f"{name} {scores[index]:.2f}" if with_scores else name
        width = min(_width(tag), _WIDTH - 2.0)
        at = place_tag((x1, y1, x2, y2), (width, _TAG_HEIGHT), (_WIDTH, height), tag_places)
        tag_places.append(at)
        words.append(tag)
        box = Box(x1, y1, max(x2 - x1, 1.0), max(y2 - y1, 1.0), _colour(labels[index]), tag)
        drawn.append(replace(box, tag_x=at[0], tag_y=at[1], tag_width=width))
    return Tile(
        "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
        _WIDTH,
        height,
        left,
        across,
        boxes=drawn[::-1],
        words=", ".join(words) or "nothing",
        more=max(0, len(order) - MOST_BOXES),
    )


def _width(tag: str) -> float:
    """Of a tag, as wide as most fonts have its text."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in tag)
    narrow = "".join(letter for letter in tag if unicodedata.east_asian_width(letter) not in "WF")
    return 1.08 * ImageFont.load_default(_FONT).getlength(narrow) + _FONT * wide + 8


def _colour(label: int) -> str:
    return COLOURS[label % len(COLOURS)]


def set_tiles(data: LabelledImages, names: Sequence[str], count: int = TILES) -> list[Tile]:
    """The first images of a set with their labels: those first that have one to be drawn.

    Args:
        data: a calibration set, of whose labels those with a score above 0.3 are drawn, or a real
            one.
        names: of the network's categories, which the labels are of.
    """
    if isinstance(data, CalibrationSet):
        sure = [i for i, scores in enumerate(data.scores) if bool((scores > REFERENCE_SCORE).any())]
        rest = [index for index in range(len(data)) if index not in set(sure)]
        indices = (sure + rest)[:count]
        pixels = data.load(indices)
        labels = [data.labels[i][data.scores[i] > REFERENCE_SCORE] for i in indices]
        scores = [data.scores[i][data.scores[i] > REFERENCE_SCORE].tolist() for i in indices]
    elif isinstance(data, LetterboxedImages):
        some = list(range(min(count, len(data))))
        images, targets, _ = load_letterboxed(
            data.images, some, data.size, data.stride, mapping=data.mapping
        )
        pixels = (images * 255).round().to(torch.uint8)
        labels = targets.per_image(len(some))
        scores = [[1.0] * len(rows) for rows in labels]
    else:
        return []
    return [
        tile(
            image.permute(1, 2, 0).numpy(),
            _corners(rows),
            rows[:, 0].long().tolist(),
            certain,
            names,
            with_scores=False,
        )
        for image, rows, certain in zip(pixels, labels, scores, strict=True)
    ]


def _corners(rows: Tensor) -> np.ndarray:
    half = rows[:, 3:] / 2
    return torch.cat([rows[:, 1:3] - half, rows[:, 1:3] + half], dim=1).double().numpy()


def pairs_on_squares(
    before: Detector,
    after: Detector,
    data: LabelledImages,
    indices: Sequence[int],
) -> list[Pair]:
    """What two networks detect in some images of a set, as they see them.

    Args:
        before, after: the float network and the low-bit one, on one device.
        data: the set.
        indices: which images may be shown.
    """
    pixels = data.load(list(indices)[:LOOKED_AT])
    detections = [
        detector.detect(pixels.to(detector.device).float() / 255) for detector in (before, after)
    ]
    images = [image.permute(1, 2, 0).numpy() for image in pixels]
    return _pairs(images, detections[0], detections[1], before.names)


def pairs_on_photos(
    before: Detector, after: Detector, photos: ImageSet, image_size: int | None
) -> list[Pair]:
    """The same of photos; `image_size`: the long side in pixels that both see, None: their own."""
    some = photos.head(LOOKED_AT)
    detections = [predict(detector, some, image_size=image_size) for detector in (before, after)]
    images = [some.load_image(index) for index in range(len(some))]
    return _pairs(images, detections[0], detections[1], before.names)


def _pairs(
    images: Sequence[np.ndarray],
    before: Sequence[Detections],
    after: Sequence[Detections],
    names: Sequence[str],
) -> list[Pair]:
    # Not chosen by how well they agree: the first in which the float network detects something.
    sure = [
        i
        for i, detections in enumerate(before)
        if bool((detections.scores > REFERENCE_SCORE).any())
    ]
    rest = [index for index in range(len(images)) if index not in sure]
    return [
        Pair(
            _detected(images[index], before[index], names),
            _detected(images[index], after[index], names),
        )
        for index in sorted((sure + rest)[:PAIRS])
    ]


def _detected(pixels: np.ndarray, detections: Detections, names: Sequence[str]) -> Tile:
    shown = detections.scores > REFERENCE_SCORE
    height, width = pixels.shape[:2]
    return tile(
        pixels,
        detections.boxes[shown].cpu().double().numpy() / np.array([width, height] * 2),
        detections.labels[shown].tolist(),
        detections.scores[shown].tolist(),
        names,
        with_scores=True,
    )

"""Pictures of predictions: an image with what was found in it, or two beside each other."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from pycocotools import mask as coco_mask

from ..data.drawing import INK, PAPER, colour, draw_boxes, font, tag_height
from ..errors import UserError, argument, shown
from ..runtime.files import (
    IMAGE_SUFFIXES,
    read_json,
    require_not_read,
    require_output_file,
)
from ..runtime.unfinished import short_name
from .prediction import KIND, Prediction

LIST = "detections.json"
"""Beside the pictures: what was found, as numbers."""

_SMALLEST, _LARGEST = 640, 8192
"""Pixels of a picture's long side: smaller images are enlarged, or tags would cover them; larger
ones are shrunk, as JPEG ends at 65535."""

_MARK = b"dfq predict"
"""A JPEG comment by which a picture is known to be one of ours, which may be replaced."""

_QUALITY = 92


def draw_prediction(
    pixels: np.ndarray, prediction: Prediction, title: str | None = None
) -> Image.Image:
    """An image with boxes, categories and scores, and masks where there are any.

    Args:
        pixels: uint8 `(height, width, 3)`, RGB, the image of `prediction`.
        prediction: what was found in it.
        title: stands above; None for none.
    """
    height, width = pixels.shape[:2]
    image, size = enlarged(_with_masks(pixels, prediction))
    text_size = max(14, round(max(size) / 55))
    # A strip of a few pixels has no room for a tag: paper is put beside it.
    least = 3 * tag_height(text_size)
    sheet = Image.new("RGB", (max(size[0], least), max(size[1], least)), PAPER)
    sheet.paste(image, (0, 0))
    factor = [size[0] / width, size[1] / height] * 2
    texts = [
        f"{shown(name, limit=40)} {score:.2f}"
        for name, score in zip(prediction.categories, prediction.scores.tolist(), strict=True)
    ]
    boxes = prediction.boxes * np.array(factor)
    draw_boxes(sheet, boxes, prediction.labels.tolist(), texts, text_size=text_size, room=size)
    return sheet if title is None else titled(sheet, title, text_size)


def enlarged(pixels: np.ndarray) -> tuple[Image.Image, tuple[int, int]]:
    """An image uint8 `(height, width, 3)` as large as a picture is to be, and its new size."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    scale = min(max(side, _SMALLEST), _LARGEST) / side
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(pixels)
    if image.size != size:
        # Pixels of what is hardly anything stay what they are.
        way = Image.Resampling.BICUBIC if side > 16 else Image.Resampling.NEAREST
        image = image.resize(size, way)
    return image, size


def draw_pair(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of one size beside each other."""
    gap = max(8, left.width // 80)
    sheet = Image.new("RGB", (left.width + gap + right.width, left.height), PAPER)
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + gap, 0))
    return sheet


def encode_picture(picture: Image.Image) -> bytes:
    """A JPEG file, marked as one of ours."""
    buffer = io.BytesIO()
    # Colours at full resolution: letters and lines are thin.
    picture.save(buffer, "JPEG", quality=_QUALITY, subsampling=0, comment=_MARK)
    return buffer.getvalue()


def name_pictures(files: Sequence[Path]) -> list[str]:
    """A name for the picture of each image: its own, numbered where several have one."""
    used_names: set[str] = set()
    names = []
    for file in files:
        stem = file.stem if file.suffix.lower() in IMAGE_SUFFIXES else file.name
        # Hidden files would not be seen.
        stem = short_name(stem.lstrip("."), 200) or "image"
        number, name = 1, f"{stem}.jpg"
        # Case does not tell files apart everywhere.
        while name.casefold() in used_names:
            number += 1
            name = f"{stem}-{number}.jpg"
        used_names.add(name.casefold())
        names.append(name)
    return names


def require_pictures(
    folder: Path,
    names: Sequence[str],
    inputs: Sequence[Path],
    listed: str = LIST,
    kind: str = KIND,
) -> None:
    """Refuse an output folder in which something else has a name that is to be written: before the
    work, and not after it.

    Args:
        folder: there or not.
        names: of the pictures.
        inputs: image files that are read.
        listed, kind: name of the list beside the pictures, and what it says that it is.

    Raises:
        UserError: a file is in the way that is not of an earlier call, or is one of the inputs.
    """
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    if listed in present:
        require_output_file(folder / listed, "out")
        if not _is_list(folder / listed, kind):
            raise _in_the_way(folder / listed)
    for name in present.intersection(names):
        path = folder / name
        require_not_read(path, "out", inputs)
        require_output_file(path, "out")
        if not _is_picture(path):
            raise _in_the_way(path)


def _is_picture(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK in file.read(256)


def _is_list(path: Path, kind: str) -> bool:
    try:
        document = read_json(path)
    except UserError:
        return False
    return isinstance(document, dict) and document.get("kind") == kind


def _in_the_way(path: Path) -> UserError:
    return UserError(
        f"{argument('out', path)}: is in the way, and is nothing that dfq predict wrote; choose "
        "another folder"
    )


def _with_masks(pixels: np.ndarray, prediction: Prediction) -> np.ndarray:
    if not prediction.segments:
        return pixels
    drawn = pixels.copy()
    for segment, label in zip(prediction.segments, prediction.labels.tolist(), strict=True):
        # One at a time: all of a large image take gigabytes.
        inside = coco_mask.decode(segment).astype(bool)
        paint = np.array(ImageColor.getrgb(colour(label)))
        drawn[inside] = (0.55 * drawn[inside] + 0.45 * paint).astype(np.uint8)
    return drawn


def titled(image: Image.Image, title: str, text_size: int) -> Image.Image:
    """The image below a line of text, which is shortened where it is too long."""
    letters, above = font(text_size), 2 * text_size
    sheet = Image.new("RGB", (image.width, above + image.height), PAPER)
    sheet.paste(image, (0, above))
    pen = ImageDraw.Draw(sheet)
    text = shown(title)
    while len(text) > 4 and pen.textlength(text, letters) > image.width:
        text = f"{text[:-4]}..."
    pen.text((text_size // 3, text_size // 2), text, INK, letters)
    return sheet

"""Letterboxing: images of any shape onto the canvas a YOLO network sees, and boxes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.base import Targets
from ..runtime.ahead import batches_of, read_all, reading_ahead
from .image_set import ImageSet, Item

PAD_VALUE = 114
"""Grey of the border, of 255: what the YOLO families are trained with."""


@dataclass(frozen=True)
class LetterboxTransform:
    """Where an image lies on its canvas. Boxes are `(n, 4)`, x1 y1 x2 y2 in pixels.

    Attributes:
        scale: canvas pixels per original pixel, horizontally and vertically (they differ by the
            rounding of the resized sides).
        offset: the image's left and top edge on the canvas, pixels.
        original: width and height of the original image.
        canvas: width and height of the canvas.
    """

    scale: tuple[float, float]
    offset: tuple[int, int]
    original: tuple[int, int]
    canvas: tuple[int, int]

    def apply(self, boxes: Tensor) -> Tensor:
        """Boxes `(n, 4)`, x1 y1 x2 y2 in pixels of the original image, in pixels of the canvas."""
        return boxes * boxes.new_tensor(self.scale * 2) + boxes.new_tensor(self.offset * 2)

    def undo(self, boxes: Tensor, *, clip: bool = True) -> Tensor:
        """Boxes `(n, 4)`, x1 y1 x2 y2 in pixels of the canvas, in pixels of the original image.

        Args:
            boxes: on the canvas.
            clip: clip them to the original image; not for boxes whose masks have to stay in place.
        """
        back = (boxes - boxes.new_tensor(self.offset * 2)) / boxes.new_tensor(self.scale * 2)
        if not clip:
            return back
        return torch.minimum(back.clamp(min=0), back.new_tensor(self.original * 2))


def letterbox(
    image: np.ndarray, size: int, stride: int, *, rect: bool
) -> tuple[np.ndarray, LetterboxTransform]:
    """Resize an image so that its long side is `size`, and pad it with grey, centred.

    Resizing is bilinear, with averaging where the image shrinks.

    Args:
        image: uint8 `(h, w, 3)`.
        size: the long side, pixels; a multiple of `stride`.
        stride: the network's largest stride.
        rect: pad each side only to the next multiple of `stride`, instead of to a square.

    Returns:
        The canvas, uint8 `(H, W, 3)`, and how boxes move between it and the image.
    """
    resized = _resize(image, size)
    height, width = resized.shape[:2]
    canvas = (_up(width, stride), _up(height, stride)) if rect else (size, size)
    return _pad(resized, canvas, (image.shape[1], image.shape[0]))


def load_letterboxed(
    imageset: ImageSet,
    indices: Sequence[int],
    size: int,
    stride: int,
    *,
    rect: bool = False,
    mapping: Sequence[int | None] | None = None,
) -> tuple[Tensor, Targets, list[LetterboxTransform]]:
    """A batch for a network out of an image set.

    Args:
        imageset: where the images come from.
        indices: which ones, at least one.
        size: the long side, pixels; a multiple of `stride`.
        stride: the network's largest stride.
        rect: pad to the smallest multiples of `stride` that hold every image of the batch, instead
            of to a square.
        mapping: the set's categories as the model's (`ImageSet.category_mapping`); objects of a
            category that the model lacks are left out. Without it targets keep the set's indices.

    Returns:
        Images float32 `(n, 3, H, W)`, RGB in [0, 1]; the boxes that are not ignored, normalised
        to the canvas; one transform an image.

    Raises:
        UserError: an image cannot be read.
    """
    read = read_all(lambda index: _read(imageset, index, size), indices)
    images, transforms = _joined(read, size, stride, rect=rect)
    labels = [
        _targets(imageset.items[index], transform, mapping)
        for index, transform in zip(indices, transforms, strict=True)
    ]
    return images, Targets.from_per_image(labels), transforms


def letterboxed_batches(
    imageset: ImageSet, size: int, stride: int, batch_size: int, *, rect: bool = False
) -> AbstractContextManager[Iterator[tuple[Tensor, list[LetterboxTransform]]]]:
    """A set's images in order, `batch_size` of them at a time, as `load_letterboxed` gives them;
    the next ones are read while the network works on these.

    Raises:
        UserError: an image cannot be read, once it is its batch's turn.
    """
    return reading_ahead(
        batches_of(range(len(imageset)), batch_size),
        lambda index: _read(imageset, index, size),
        lambda _, read: _joined(read, size, stride, rect=rect),
    )


_Read = tuple[np.ndarray, tuple[int, int]]
"""A resized image, uint8 `(h, w, 3)`, and the original's width and height."""


def _read(imageset: ImageSet, index: int, size: int) -> _Read:
    image = imageset.load_image(index)
    return _resize(image, size), (image.shape[1], image.shape[0])


def _joined(
    read: Sequence[_Read], size: int, stride: int, *, rect: bool
) -> tuple[Tensor, list[LetterboxTransform]]:
    canvas = (size, size)
    if rect:
        canvas = (
            _up(max(image.shape[1] for image, _ in read), stride),
            _up(max(image.shape[0] for image, _ in read), stride),
        )
    padded = [_pad(image, canvas, original) for image, original in read]
    stacked = torch.from_numpy(np.stack([image for image, _ in padded]))
    images = stacked.permute(0, 3, 1, 2).contiguous().float() / 255
    return images, [transform for _, transform in padded]


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    ratio = size / max(height, width)
    target = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    if target == (width, height):
        return image
    # Pillow's bilinear filter averages over all the pixels that shrink into one. OpenCV's
    # INTER_LINEAR, which Ultralytics uses, skips some: on 134 COCO images at 320 px that moves a
    # YOLOv5n's AP by 0.001 and, through categories of a few objects, its AP50 by 0.016.
    return np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BILINEAR))


def _pad(
    resized: np.ndarray, canvas: tuple[int, int], original: tuple[int, int]
) -> tuple[np.ndarray, LetterboxTransform]:
    """Centre `resized` on a grey canvas of the given width and height."""
    height, width = resized.shape[:2]
    left, top = (canvas[0] - width) // 2, (canvas[1] - height) // 2
    padded = np.full((canvas[1], canvas[0], 3), PAD_VALUE, np.uint8)
    padded[top : top + height, left : left + width] = resized
    scale = (width / original[0], height / original[1])
    return padded, LetterboxTransform(scale, (left, top), original, canvas)


def _up(side: int, stride: int) -> int:
    return -(-side // stride) * stride


def _targets(
    item: Item, transform: LetterboxTransform, mapping: Sequence[int | None] | None
) -> Tensor:
    """Labels of one image, `(n, 5)`: category and normalised centre and size on the canvas."""
    categories = [int(label) if mapping is None else mapping[label] for label in item.labels]
    keep = [
        row
        for row, category in enumerate(categories)
        if category is not None and not item.ignore[row]
    ]
    boxes = transform.apply(torch.from_numpy(item.boxes[keep]))
    sides = boxes.new_tensor(transform.canvas)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 / sides
    extent = (boxes[:, 2:] - boxes[:, :2]) / sides
    labels = torch.tensor([categories[row] for row in keep], dtype=torch.float32)
    return torch.cat([labels[:, None], centre, extent], dim=1)

"""Images as classifiers take them: resized, and their middle cut out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..models.base import Targets
from ..models.classifying import Classifying, Preprocessing, whole_image
from ..runtime.ahead import batches_of, read_all, reading_ahead
from .class_set import ClassSet, match_classes

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def cropped(image: np.ndarray, preprocessing: Preprocessing, size: int) -> np.ndarray:
    """The middle of an image, as torchvision's `Resize` and `CenterCrop` give it.

    Args:
        image: uint8 `(h, w, 3)`.
        preprocessing: how it is cut and resized.
        size: side of the result, pixels.

    Returns:
        uint8 `(size, size, 3)`.
    """
    height, width = image.shape[:2]
    short = max(size, round(size / preprocessing.crop))
    # Rounded down, as torchvision does.
    if width <= height:
        target = (short, max(size, int(short * height / width)))
    else:
        target = (max(size, int(short * width / height)), short)
    if target != (width, height):
        resample = _FILTERS[preprocessing.interpolation]
        image = np.asarray(Image.fromarray(image).resize(target, resample))
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return image[top : top + size, left : left + size]


class CroppedImages:
    """A set of class folders in the shape that calibration, training and evaluation take it in.

    Args:
        images: the set, labelled or not.
        model: whose categories and preprocessing count.
        size: side in pixels, a multiple of the stride; None: the model's own.

    Attributes:
        names: the model's categories.
        mapping: of the set's categories, the model's; None where the model has none.
        by_position: whether names had nothing to do with it, see `match_classes`.

    Raises:
        UserError: the set is labelled and shares no category with the model.
    """

    def __init__(self, images: ClassSet, model: Classifying, size: int | None = None) -> None:
        self.images, self.preprocessing = images, model.preprocessing
        self.names = list(model.names)
        self.size = size or model.image_size
        self.mapping: list[int | None] = []
        self.by_position = False
        if images.names:
            self.mapping, self.by_position = match_classes(
                images.names, model.names, str(images.source)
            )

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: Sequence[int]) -> Tensor:
        """uint8 `(n, 3, s, s)`, RGB; decoded on several threads.

        Raises:
            UserError: an image cannot be read.
        """
        return torch.from_numpy(np.stack(read_all(self._read, indices)))

    def batches(
        self, indices: Sequence[int], size: int
    ) -> AbstractContextManager[Iterator[Tensor]]:
        """What `load` gives for `size` of the images at a time; the next ones are read while the
        network works on these.

        Raises:
            UserError: an image cannot be read, once it is its batch's turn.
        """
        return reading_ahead(
            batches_of(indices, size),
            self._read,
            lambda _, read: torch.from_numpy(np.stack(read)),
        )

    def _read(self, index: int) -> np.ndarray:
        image = cropped(self.images.load_image(index), self.preprocessing, self.size)
        return np.ascontiguousarray(image.transpose(2, 0, 1))

    def label(self, index: int) -> int | None:
        """The model's category of an image; None where it has none."""
        category = self.images.files[index][1]
        return self.mapping[category] if category >= 0 else None

    def labelled(self) -> tuple[list[int], Tensor]:
        """The images with a category that the model has, and these, int64 `(n,)`.

        Raises:
            UserError: there is none.
        """
        labels = {index: self.label(index) for index in range(len(self))}
        known = {index: label for index, label in labels.items() if label is not None}
        if not known:
            raise UserError(f"{self.images.source}: has no image of the model's categories")
        return list(known), torch.tensor(list(known.values()))

    def targets(self, indices: Sequence[int]) -> Targets:
        """Labels whose boxes are the whole image."""
        labels = [self.label(index) for index in indices]
        return Targets.from_per_image(
            [whole_image(torch.tensor([] if label is None else [label])) for label in labels]
        )

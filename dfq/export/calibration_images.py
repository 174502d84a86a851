"""Calibration images as other tools take them: one by one, in order, in the network's layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..data.calibration_set import CalibrationSet
from ..data.image_set import ImageSet, image_size
from ..data.letterbox import letterbox, load_letterboxed
from ..data.readers import open_set
from ..errors import UserError, shown
from ..runtime.files import user_path
from ..runtime.limits import LARGEST_SIDE

Layout = Literal["nchw", "nhwc"]
Values = Literal["float32", "uint8"]
Source = CalibrationSet | ImageSet | str | Path


@dataclass(frozen=True)
class CalibrationImages:
    """Images as a network is given them, each of which is read when it is asked for.

    A sequence: `images[i]` and iteration give arrays `(1, 3, s, s)` or, with the layout "nhwc",
    `(1, s, s, 3)`; RGB, float32 in [0, 1] or, with the values "uint8", uint8 in [0, 255]. Every
    image is there once, in the order of the set, and each iteration begins anew.

    Attributes:
        source: where they come from.
        side: `s`, pixels.
        layout, values: of the arrays.
    """

    source: CalibrationSet | ImageSet
    side: int
    layout: Layout = "nchw"
    values: Values = "float32"

    @classmethod
    def open(
        cls,
        data: Source,
        image_size: int | None = None,
        *,
        layout: Layout = "nchw",
        values: Values = "float32",
    ) -> CalibrationImages:
        """Open a set of any kind.

        Args:
            data: a calibration set, whose images are as the network saw them; or real images, as
                `open_set` reads them, which are letterboxed (a grey border, as YOLO networks are
                trained with). Labels are not needed.
            image_size: side of the network's input, pixels. It may be left out for a calibration
                set, and for real images that are all squares of one size.
            layout, values: what the network takes; see the class.

        Raises:
            UserError: there is no such set, it is damaged, or its images have another size.
        """
        if layout not in ("nchw", "nhwc") or values not in ("float32", "uint8"):
            raise ValueError(f"no such layout or values: {layout!r}, {values!r}")
        source = _opened(data)
        side = _common_side(source)
        if image_size is not None and not 0 < image_size <= LARGEST_SIDE:
            raise UserError(f"--image-size {image_size}: must be from 1 to {LARGEST_SIDE}")
        if isinstance(source, CalibrationSet):
            if side is None:
                raise UserError(f"{source.root}: its images are no squares of one size")
            if image_size not in (None, side):
                raise UserError(
                    f"--image-size {image_size}: the images of {source.root} are {side} x {side}; "
                    "leave it out, or make another set with dfq synthesize"
                )
        elif image_size is None and side is None:
            raise UserError(
                f"{shown(source.source)}: its images are no squares of one size; give the side of "
                "the network's input as --image-size"
            )
        return cls(source, image_size or side or 0, layout, values)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> np.ndarray:
        image = self.pixels(index)
        if self.layout == "nchw":
            image = image.transpose(2, 0, 1)
        image = np.ascontiguousarray(image[None])
        return image.astype(np.float32) / np.float32(255) if self.values == "float32" else image

    def pixels(self, index: int) -> np.ndarray:
        """Image `index`: uint8 `(s, s, 3)`, RGB.

        Raises:
            UserError: it cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        if isinstance(self.source, CalibrationSet):
            image = self.source.load([index])[0].permute(1, 2, 0).numpy()
        else:
            image, _ = letterbox(self.source.load_image(index), self.side, 1, rect=False)
        if image.shape != (self.side, self.side, 3):
            raise UserError(f"{self.source}: image {index} is {image.shape[1]} x {image.shape[0]}")
        return image

    @property
    def names(self) -> list[str]:
        """Category names by index; one that stands for anything where there are no labels."""
        return self.source.names or ["object"]

    def label(self, index: int) -> Tensor:
        """Labels of image `index`, float32 `(n, 5)`: category, and the box's centre and size as
        shares of the square."""
        if isinstance(self.source, CalibrationSet):
            return self.source.labels[index]
        if not self.source.labelled:
            return torch.zeros(0, 5)
        return _clipped(load_letterboxed(self.source, [index], self.side, 1)[1].per_image(1)[0])


def _opened(data: Source) -> CalibrationSet | ImageSet:
    if isinstance(data, CalibrationSet):
        return data.require_intact()
    if isinstance(data, ImageSet):
        return data
    # First as what it is in any case: this says what is wrong with a path.
    image_set = open_set(data)
    path = user_path(data)
    if path.is_dir() and CalibrationSet.is_one(path):
        return CalibrationSet.open(path).require_intact()
    return image_set


def _clipped(label: Tensor) -> Tensor:
    """Boxes cut to the image: Ultralytics leaves out images with a box that is not in them."""
    low, high = label[:, 1:3] - label[:, 3:] / 2, label[:, 1:3] + label[:, 3:] / 2
    low, high = low.clamp(0, 1), high.clamp(0, 1)
    cut = torch.cat([label[:, :1], (low + high) / 2, high - low], dim=1)
    return cut[(cut[:, 3:] > 0).all(dim=1)]


def _common_side(source: CalibrationSet | ImageSet) -> int | None:
    """The side of all images, where they are squares of one size."""
    if isinstance(source, CalibrationSet):
        sizes = {image_size(source.root / name) for name in source.files}
    else:
        sizes = {(image.width, image.height) for image in source.items}
    width, height = next(iter(sizes), (0, 1))
    return width if len(sizes) == 1 and width == height else None

"""The sets that `dfq qat` is given, opened and checked before any work."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..data.calibration_set import CalibrationSet
from ..data.cropped_images import CroppedImages
from ..data.image_set import image_size
from ..data.pixels import LabelledImages, Pixels
from ..data.training_images import (
    LetterboxedImages,
    labelled,
    open_training_data,
    real_images,
)
from ..errors import UserError, argument, shown
from ..evaluation.measuring import RealSet, open_labelled, open_unlabelled
from ..models.base import Model
from ..recipe import Recipe
from ..runtime.ahead import read_all
from ..runtime.files import user_path

MOST_JOINING = 64
"""Real images that calibration takes, at most."""


def labelled_set(source: str | None, settings: Recipe, detector: Model) -> RealSet | None:
    """A set to measure on, checked; None where none is named."""
    if not source:
        return None
    images = open_labelled(source, detector)
    size = settings.evaluation.image_size or detector.image_size
    detector.check_size(size, "evaluation.image_size")
    return images


def photographs(source: str | Path | None, settings: Recipe, detector: Model) -> RealSet | None:
    """Real images, each of which can be read, without the labels they may have; None where none are
    named.

    Raises:
        UserError: they are no images, or one is broken.
    """
    if source is None:
        return None
    try:
        photos = open_unlabelled(source, detector)
        # Now, not after hours of training.
        read_all(lambda index: photos.load_image(index).shape, range(len(photos)))
    except UserError as error:
        raise UserError(f"{argument('photos')}: {error}") from None
    size = settings.evaluation.image_size or detector.image_size
    detector.check_size(size, "evaluation.image_size")
    return photos


def training_data(data: str | Path, settings: Recipe, detector: Model) -> LabelledImages:
    """The set to train on, checked; errors are those of `open_training_data`, and labels that the
    recipe needs and the set has not."""
    images = open_training_data(data, detector, settings.synthesis.image_size)
    if not labelled(images) and settings.distillation.weights.task > 0:
        raise UserError(
            f"{data}: has no labels for the task loss; "
            "use a labelled set or --set distillation.weights.task=0"
        )
    return images


def remark(calibration: LabelledImages) -> str | None:
    """What was left out of a real set, in a line; None for nothing."""
    if isinstance(calibration, LetterboxedImages | CroppedImages):
        return calibration.images.remark()
    return None


def require_side(calibration: LabelledImages, size: int) -> None:
    """Refuse a size that a calibration set does not have: its images are as they were made."""
    if isinstance(calibration, CalibrationSet):
        width, height = image_size(calibration.root / calibration.files[0])
        if size != max(width, height):
            raise UserError(
                f"--image-size {size}: the images of {calibration.root} are {width} x {height}; "
                "leave it out, or make another set with dfq synthesize"
            )


def refuse_set(source: str | Path) -> None:
    """Refuse a calibration set in the place of a detector."""
    path = user_path(source)
    if path.is_dir() and CalibrationSet.is_one(path):
        raise UserError(
            f"{shown(source)}: is a calibration set and no detector; give the detector here, and "
            "the set as --data"
        )


def joining(count: int) -> list[int]:
    """Which of `count` photos join calibration; the others are left to look at."""
    return list(range(0, count - 1, 2))[:MOST_JOINING]


class WithPhotographs:
    """Real images between those of a set, as calibration takes them: by turns, while there are any.

    Args:
        photos: images without labels, some of which join (see `joining`); the others are left to
            look at (`left`).
        others: the set.
        detector: whose stride counts.
    """

    def __init__(self, photos: RealSet, others: LabelledImages, detector: Model) -> None:
        joined = joining(len(photos))
        left = [index for index in range(len(photos)) if index not in joined]
        self.left = photos.only(left)
        size = others.load([0]).shape[-1]
        self.photos = real_images(photos.only(joined), detector, size)
        self.others = others

    def __len__(self) -> int:
        return len(self.photos) + len(self.others)

    def load(self, indices: list[int]) -> Tensor:
        """uint8 `(n, 3, s, s)`, RGB."""
        twice = 2 * min(len(self.photos), len(self.others))
        images = []
        for index in indices:
            source: Pixels
            if index < twice:
                source, place = (self.others if index % 2 else self.photos), index // 2
            elif len(self.photos) > len(self.others):
                source, place = self.photos, index - len(self.others)
            else:
                source, place = self.others, index - len(self.photos)
            images.append(source.load([place]))
        return torch.cat(images)

"""Sets as training and calibration take them: synthetic ones as they are, real ones letterboxed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError, shown
from ..models.base import Model, Targets
from ..models.classifying import Classifier
from ..runtime.files import user_path
from .calibration_set import CalibrationSet
from .class_set import ClassSet, open_class_set, open_photo_set
from .cropped_images import CroppedImages
from .image_set import ImageSet, image_size
from .letterbox import load_letterboxed
from .readers import open_set


class LetterboxedImages:
    """A real image set in the shape the trainer takes: letterboxed squares, labels by name.

    Args:
        images: the set, labelled or not.
        detector: whose categories its names are matched with.
        size: side of the squares in pixels, a multiple of the stride.

    Raises:
        UserError: where the set is labelled, and shares no category with the detector, or none of
            its boxes is usable.
    """

    def __init__(self, images: ImageSet, detector: Model, size: int) -> None:
        self.images, self.size, self.stride = images, size, detector.stride
        images.require_boxes()
        # An unlabelled set has no names to match.
        self.mapping = images.category_mapping(detector.names) if images.labelled else None
        self._labels: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: list[int]) -> Tensor:
        """The images at these places, letterboxed: uint8 `(n, 3, size, size)`, RGB.

        Raises:
            UserError: one cannot be read.
        """
        pixels, targets, _ = load_letterboxed(
            self.images, indices, self.size, self.stride, mapping=self.mapping
        )
        if indices == list(range(len(self))):
            self._labels = targets.per_image(len(indices))
        return (pixels * 255).round().to(torch.uint8)

    def targets(self, indices: list[int]) -> Targets:
        if not self._labels:
            self.load(list(range(len(self))))
        return Targets.from_per_image([self._labels[i] for i in indices])


def real_images(
    images: ImageSet | ClassSet, model: Model, size: int
) -> LetterboxedImages | CroppedImages:
    """A real set in the shape that a model takes it in."""
    if isinstance(images, ClassSet):
        if not isinstance(model, Classifier):
            raise TypeError(f"{model.family}: takes no set of class folders")
        return CroppedImages(images, model, size)
    return LetterboxedImages(images, model, size)


def labelled(images: object) -> bool:
    """Whether a set has labels to train on: a calibration set has."""
    if isinstance(images, LetterboxedImages):
        return images.images.labelled
    return bool(images.images.names) if isinstance(images, CroppedImages) else True


def open_training_data(
    source: str | Path, detector: Model, size: int | None
) -> CalibrationSet | LetterboxedImages | CroppedImages:
    """A calibration set of this very model, or any real set letterboxed to `size`, or, for a
    classifier, resized and cut to it.

    Raises:
        UserError: where the set is unfinished, empty, broken, changed, or made from another
            checkpoint.
    """
    path = user_path(source)
    if not CalibrationSet.is_one(path):
        detector.check_size(size or detector.image_size, "synthesis.image_size")
        side = size or detector.image_size
        if isinstance(detector, Classifier):
            return CroppedImages(classes_or_photos(path), detector, side)
        return LetterboxedImages(open_set(path), detector, side)
    calibration_set = CalibrationSet.open(path)
    made_from = str(calibration_set.manifest["determinants"].get("checkpoint"))
    if made_from != detector.fingerprint:
        raise UserError(
            f"{path}: this set was made from another checkpoint (sha256 {shown(made_from, 15)}, "
            f"the model's is {detector.fingerprint[:12]}...); make one with dfq synthesize"
        )
    calibration_set.require_intact()
    for side in image_size(path / calibration_set.files[0]):
        detector.check_size(side, f"{path}: the side of its images")
    return calibration_set


def classes_or_photos(path: Path) -> ClassSet:
    """A set of class folders; images that lie in none are an unlabelled one."""
    photos = open_photo_set(path)
    loose = any("/" not in name for name, _ in photos.files)
    return photos if loose else open_class_set(path)

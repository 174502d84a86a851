"""Measuring a model by what it is: boxes of a detector, categories of a classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.class_set import ClassSet, match_classes, open_class_set, open_photo_set
from ..data.image_set import ImageSet
from ..data.readers import open_set
from ..errors import UserError, shown
from ..models.base import Detector, Model
from ..models.classifying import Classifier
from ..runtime.progress import Progress
from .agreement import Agreement, Kept, agreement, on_squares, sentence, unlabelled
from .classification import (
    Agreed,
    ClassificationMetrics,
    agreed_on_pixels,
    class_agreement,
    evaluate_classifier,
)
from .coco import Metrics, evaluate
from .coco_matching import require_labels

RealSet = ImageSet | ClassSet
"""Real images, as a model of either kind is measured on."""

UNKNOWN = "is a model of no kind that can be measured"


def open_labelled(source: str | Path, model: Model) -> RealSet:
    """A labelled set that a model can be measured on.

    Raises:
        UserError: there is none, or it shares no category with the model.
    """
    if isinstance(model, Classifier):
        classes = open_class_set(source)
        match_classes(classes.names, model.names, shown(source))
        return classes
    images = open_set(source)
    require_labels(images)
    images.category_mapping(model.names)
    return images


def open_unlabelled(source: str | Path, model: Model) -> RealSet:
    """Real images without the labels that they may have.

    Raises:
        UserError: there are none.
    """
    if isinstance(model, Classifier):
        return open_photo_set(source)
    return unlabelled(open_set(source))


def measured(
    model: Model,
    data: RealSet,
    *,
    image_size: int | None = None,
    interval: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Metrics | ClassificationMetrics:
    """The accuracy of a model on what `open_labelled` gave for it.

    Raises:
        UserError: an image cannot be read, or the size is none that the model can take.
    """
    if isinstance(model, Classifier) and isinstance(data, ClassSet):
        return evaluate_classifier(
            model, data, image_size=image_size, interval=interval, progress=progress
        )
    if isinstance(model, Detector) and isinstance(data, ImageSet):
        return evaluate(model, data, image_size=image_size, interval=interval, progress=progress)
    raise TypeError(f"{model.family}: {UNKNOWN}")


def main_figure(values: Any) -> str:
    """Which of the figures that `measured` gives is the one to go by: "AP" or "top1"."""
    known = values if isinstance(values, dict) else vars(values)
    return "top1" if "top1" in known else "AP"


def close_on_pixels(model: Model, reference: Model, pixels: Tensor) -> Kept | Agreed:
    """How much of what the float network says another one says too, on images as they take them,
    uint8 `(n, 3, h, w)`."""
    if isinstance(model, Classifier) and isinstance(reference, Classifier):
        return agreed_on_pixels(model, reference, pixels)
    if isinstance(model, Detector) and isinstance(reference, Detector):
        return on_squares(model, reference, pixels)
    raise TypeError(f"{model.family}: {UNKNOWN}")


def close_on_images(
    model: Model,
    reference: Model,
    images: RealSet,
    *,
    progress: Progress,
    image_size: int | None = None,
) -> Agreement | Agreed:
    """The same on real images, whose labels do not count.

    Raises:
        UserError: an image cannot be read, or the size is none that both can take.
    """
    if isinstance(model, Classifier) and isinstance(reference, Classifier):
        if not isinstance(images, ClassSet):
            raise UserError(f"{images.source}: give a folder or a ZIP file of images")
        return class_agreement(model, reference, images, progress=progress, image_size=image_size)
    if isinstance(model, Detector) and isinstance(reference, Detector):
        assert isinstance(images, ImageSet)
        return agreement(model, reference, images, progress=progress, image_size=image_size)
    raise TypeError(f"{model.family}: {UNKNOWN}")


def closeness_sentence(closeness: Kept | Agreed, where: str) -> str:
    """What was found, for people; `where` are the images."""
    return (
        closeness.sentence(where) if isinstance(closeness, Agreed) else sentence(closeness, where)
    )

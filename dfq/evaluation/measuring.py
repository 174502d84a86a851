"""Measuring a model by its task: boxes of a detector, categories of a classifier.

All that the two tasks have apart in evaluation is a method of `Measuring`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.class_set import ClassSet, match_classes, open_class_set, open_photo_set
from ..data.image_set import ImageSet
from ..data.readers import open_set
from ..errors import UserError, argument, shown
from ..models.base import Model, Predicting
from ..models.detecting import Task
from ..runtime.progress import Progress
from .agreement import (
    Agreement,
    Kept,
    agreement,
    check_categories,
    on_squares,
    unlabelled,
)
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
"""Real images, as a model of either task is measured on."""

Told = Callable[[int, int], object]
"""Called with the number of images done and the number of images there are."""


class Measuring(ABC):
    """How models of a task are measured.

    Attributes:
        main: the figure to go by, of those that `measured` gives.
        metric: what people call it.
    """

    main: str
    metric: str

    @abstractmethod
    def open_labelled(self, source: str | Path, model: Predicting) -> RealSet:
        """A labelled set that a model can be measured on.

        Raises:
            UserError: there is none, or it shares no category with the model.
        """

    @abstractmethod
    def open_unlabelled(self, source: str | Path) -> RealSet:
        """Real images without the labels that they may have.

        Raises:
            UserError: there are none.
        """

    @abstractmethod
    def measured(
        self,
        model: Any,
        data: Any,
        *,
        image_size: int | None,
        interval: bool,
        progress: Told | None,
    ) -> Metrics | ClassificationMetrics:
        """The accuracy of a model of this task on what `open_labelled` gave for it."""

    @abstractmethod
    def close_on_pixels(self, model: Any, reference: Any, pixels: Tensor) -> Kept | Agreed:
        """How much of what the float network says another one says too."""

    @abstractmethod
    def close_on_images(
        self, model: Any, reference: Any, images: Any, **options: Any
    ) -> Agreement | Agreed:
        """The same on what `open_unlabelled` gave; options are those of `agreement`."""


class _OfDetectors(Measuring):
    main = metric = "AP"

    def open_labelled(self, source: str | Path, model: Predicting) -> ImageSet:
        images = open_set(source)
        require_labels(images)
        images.category_mapping(model.names)
        return images

    def open_unlabelled(self, source: str | Path) -> ImageSet:
        return unlabelled(open_set(source))

    def measured(
        self,
        model: Any,
        data: Any,
        *,
        image_size: int | None,
        interval: bool,
        progress: Told | None,
    ) -> Metrics:
        return evaluate(model, data, image_size=image_size, interval=interval, progress=progress)

    def close_on_pixels(self, model: Any, reference: Any, pixels: Tensor) -> Kept:
        return on_squares(model, reference, pixels)

    def close_on_images(self, model: Any, reference: Any, images: Any, **options: Any) -> Agreement:
        return agreement(model, reference, images, **options)


class _OfClassifiers(Measuring):
    main, metric = "top1", "top-1 accuracy"

    def open_labelled(self, source: str | Path, model: Predicting) -> ClassSet:
        classes = open_class_set(source)
        match_classes(classes.names, model.names, shown(source))
        return classes

    def open_unlabelled(self, source: str | Path) -> ClassSet:
        return open_photo_set(source)

    def measured(
        self,
        model: Any,
        data: Any,
        *,
        image_size: int | None,
        interval: bool,
        progress: Told | None,
    ) -> ClassificationMetrics:
        return evaluate_classifier(
            model, data, image_size=image_size, interval=interval, progress=progress
        )

    def close_on_pixels(self, model: Any, reference: Any, pixels: Tensor) -> Agreed:
        return agreed_on_pixels(model, reference, pixels)

    def close_on_images(self, model: Any, reference: Any, images: Any, **options: Any) -> Agreed:
        # There is no interval of it.
        options.pop("interval", None)
        return class_agreement(model, reference, images, **options)


_MEASURING: Mapping[Task, Measuring] = {
    "detection": _OfDetectors(),
    "classification": _OfClassifiers(),
}


def open_labelled(source: str | Path, model: Predicting) -> RealSet:
    """`Measuring.open_labelled` of the model's task."""
    return _MEASURING[model.task].open_labelled(source, model)


def open_unlabelled(source: str | Path, model: Predicting) -> RealSet:
    """`Measuring.open_unlabelled` of the model's task."""
    return _MEASURING[model.task].open_unlabelled(source)


def measured(
    model: Predicting,
    data: RealSet,
    *,
    image_size: int | None = None,
    interval: bool = False,
    progress: Told | None = None,
) -> Metrics | ClassificationMetrics:
    """The accuracy of a model, or of a file, on what `open_labelled` gave for it.

    Raises:
        UserError: an image cannot be read, or the size is none that the model can take.
    """
    return _MEASURING[model.task].measured(
        model, data, image_size=image_size, interval=interval, progress=progress
    )


def main_figure(task: Task) -> str:
    """Which of the figures that `measured` gives is the one to go by: "AP" or "top1"."""
    return _MEASURING[task].main


def metric_name(task: Task) -> str:
    """What people call the figure to go by."""
    return _MEASURING[task].metric


def check_alike(model: Predicting, reference: Predicting, name: str = "against") -> None:
    """Refuse two models that do not say the same kind of thing.

    Args:
        model, reference: the models.
        name: of the argument that named the second.

    Raises:
        UserError: their tasks or their categories differ; the first difference is named.
    """
    if model.task != reference.task:
        does = {"detection": "detects objects", "classification": "classifies images"}
        raise UserError(
            f"{argument(name, reference.source)}: {does[reference.task]}, and "
            f"{shown(model.source)} {does[model.task]}; give the float model that it was made from"
        )
    check_categories(model, reference, name)


def close_on_pixels(model: Model, reference: Model, pixels: Tensor) -> Kept | Agreed:
    """How much of what the float network says another one of its task says too, on images as they
    take them, uint8 `(n, 3, h, w)`."""
    return _MEASURING[model.task].close_on_pixels(model, reference, pixels)


def close_on_images(
    model: Predicting,
    reference: Predicting,
    images: RealSet,
    *,
    progress: Progress,
    image_size: int | None = None,
    interval: bool = False,
) -> Agreement | Agreed:
    """The same on real images, whose labels do not count.

    Raises:
        UserError: an image cannot be read, or the size is none that both can take.
    """
    return _MEASURING[model.task].close_on_images(
        model, reference, images, progress=progress, image_size=image_size, interval=interval
    )


def closeness_sentence(closeness: Kept | Agreed, where: str) -> str:
    """What was found, for people; `where` are the images."""
    return closeness.sentence(where)

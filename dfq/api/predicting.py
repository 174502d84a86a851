"""How `dfq predict` asks models of each task, and shows what they say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data.cropped_images import cropped
from ..data.letterbox import letterbox
from ..data.photos import read_photo
from ..errors import UserError, argument
from ..evaluation import class_prediction, prediction_picture
from ..evaluation.class_picture import draw_classes
from ..evaluation.class_prediction import ClassPrediction, ClassPredictions, require_finite
from ..evaluation.detection import detect_batch
from ..evaluation.prediction import KIND, Prediction, Predictions, prediction
from ..evaluation.prediction_list import PredictionList
from ..models.base import Detecting
from ..models.classifying import Classifying
from ..models.detecting import Task

THRESHOLD = 0.25
"""Score of detections, where nobody says another."""

Read = Any
"""An image as a model takes it, and what of it the prediction needs."""


class Asking(ABC):
    """What `dfq predict` does with models of a task.

    Attributes:
        listed: name of the file beside the pictures that has all of it as numbers.
        kind: what this file says that it is.
        verb: what models of the task do, for the bar of progress.
    """

    listed: str
    kind: str
    verb: str

    @abstractmethod
    def check(self, threshold: float | None) -> None:
        """Refuse options that are not for this task."""

    @abstractmethod
    def begun(self, threshold: float | None, **values: Any) -> PredictionList[Any]:
        """An empty list, to be filled; `values` are those of `PredictionList`."""

    @abstractmethod
    def read(self, file: Path, model: Any, size: int) -> Read:
        """An image as the model takes it.

        Raises:
            UserError: it cannot be read.
        """

    @abstractmethod
    def say(
        self, ready: Sequence[tuple[Path, Read]], model: Any, predictions: Any
    ) -> Sequence[Any]:
        """What a model says of a batch that was read, an entry an image."""

    @abstractmethod
    def draw(self, file: Path, said: Any, title: str | None) -> Image.Image:
        """A picture of an image and what is said of it."""

    def compared(self, said: Any, reference: Any) -> Any:
        """What is said of an image, with what the float model says of it."""
        return replace(said, reference=reference)


class _AskingDetectors(Asking):
    listed, kind, verb = prediction_picture.LIST, KIND, "detection"

    def check(self, threshold: float | None) -> None:
        if threshold is not None and not (
            isinstance(threshold, int | float) and 0 <= threshold <= 1
        ):
            raise UserError(
                f"{argument('threshold', threshold)}: is no score; give one from 0 to 1"
            )

    def begun(self, threshold: float | None, **values: Any) -> Predictions:
        return Predictions(threshold=float(THRESHOLD if threshold is None else threshold), **values)

    def read(self, file: Path, model: Detecting, size: int) -> Read:
        canvas, transform = letterbox(read_photo(file), size, model.stride, rect=False)
        return torch.from_numpy(canvas), transform

    def say(
        self, ready: Sequence[tuple[Path, Read]], model: Detecting, predictions: Predictions
    ) -> list[Prediction]:
        images = torch.stack([canvas for _, (canvas, _) in ready]).permute(0, 3, 1, 2).contiguous()
        transforms = [transform for _, (_, transform) in ready]
        rows = detect_batch(
            model,
            images.float() / 255,
            transforms,
            score_threshold=predictions.threshold,
            masks=model.has_masks,
        )
        return [
            prediction(
                str(file),
                transform.original,
                detections,
                model.names,
                segments if model.has_masks else None,
            )
            for (file, _), transform, (detections, segments) in zip(
                ready, transforms, rows, strict=True
            )
        ]

    def draw(self, file: Path, said: Prediction, title: str | None) -> Image.Image:
        # Read again: a batch of large images would not fit into memory.
        return prediction_picture.draw_prediction(read_photo(file), said, title)


class _AskingClassifiers(Asking):
    listed, kind, verb = "classes.json", class_prediction.KIND, "classification"

    def check(self, threshold: float | None) -> None:
        if threshold is not None:
            raise UserError(
                f"{argument('threshold', threshold)}: is for detectors; of a classifier the "
                f"{class_prediction.LISTED} likeliest categories are listed; leave it out"
            )

    def begun(self, threshold: float | None, **values: Any) -> ClassPredictions:
        return ClassPredictions(**values)

    def read(self, file: Path, model: Classifying, size: int) -> Read:
        pixels = read_photo(file)
        square = cropped(pixels, model.preprocessing, size)
        return torch.from_numpy(square.copy()), (pixels.shape[1], pixels.shape[0])

    def say(
        self, ready: Sequence[tuple[Path, Read]], model: Classifying, predictions: ClassPredictions
    ) -> list[ClassPrediction]:
        images = torch.stack([square for _, (square, _) in ready]).permute(0, 3, 1, 2).contiguous()
        logits = require_finite(model.classify(images.float() / 255), model.source)
        return [
            ClassPrediction(str(file), size[0], size[1], row, model.names)
            for (file, (_, size)), row in zip(ready, logits, strict=True)
        ]

    def draw(self, file: Path, said: ClassPrediction, title: str | None) -> Image.Image:
        return draw_classes(read_photo(file), said, title)


ASKING: Mapping[Task, Asking] = {
    "detection": _AskingDetectors(),
    "classification": _AskingClassifiers(),
}

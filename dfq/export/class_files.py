"""Anyone's files of classifiers: which output has the logits, and how the input is normalised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, shown
from ..evaluation.classification import divergences
from ..models.classifying import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from ..models.detecting import Task
from .exported import ExportedClassifier
from .layouts import described, input_side, run_in_batches
from .opening import RuntimeFile

USUAL_SIDE = 224
"""Pixels, of files that take images of any side."""

_SMALL = 64
"""Images up to this side are seen whole; of larger ones the middle is cut out, as torchvision
does."""

_LEAST = 1e-4
"""Probabilities are no smaller, whose logarithm is taken: a file's have 8 bits."""


@dataclass(frozen=True)
class Input:
    """How images in [0, 1] become what a graph takes: less `mean`, divided by `std`.

    Attributes:
        words: for people.
        mean, std: of R, G and B.
    """

    words: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_PLAIN = Input("in [0, 1]", (0.0,) * 3, (1.0,) * 3)
_IMAGENET = Input("normalised by ImageNet's mean and spread", IMAGENET_MEAN, IMAGENET_STD)
_OTHERS = (
    _IMAGENET,
    Input("in [-1, 1]", (0.5,) * 3, (0.5,) * 3),
    Input("from 0 to 255", (0.0,) * 3, (1 / 255,) * 3),
)


def task_of(file: RuntimeFile) -> Task:
    """What anyone's file is for: a classifier's gives a row of numbers an image, and nothing else.

    Raises:
        UserError: its input is no batch of square images.
    """
    outputs = _try(file, input_side(file) or USUAL_SIDE)
    rows = [value for value in outputs.values() if _is_row(value)]
    return "classification" if len(rows) == len(outputs) else "detection"


def _try(file: RuntimeFile, side: int) -> dict[str, np.ndarray]:
    """Outputs for a few images of noise, always the same."""
    draw = np.random.default_rng(0)
    images = draw.random((file.input_shape[0] or 4, 3, side, side), dtype=np.float32)
    return file.run(images)


def _is_row(value: np.ndarray) -> bool:
    """`(n, classes)`, or the same with sides of 1 behind."""
    return value.ndim >= 2 and value.shape[1] > 1 and all(side == 1 for side in value.shape[2:])


class ForeignClassifier(ExportedClassifier):
    """Anyone's file of a classifier, float or quantized.

    Args:
        file: opened.
        names: categories; None: as many as it gives numbers, by number.
        image_size: side in pixels, for files that take any.
        preprocessing: how images are resized and cut; None: the usual way.

    Attributes:
        input: how the graph wants its images; see `choose_input`.
        gives_probabilities: whether softmax is part of it.

    Raises:
        UserError: its input is no image, or no output has a number for each category.
    """

    def __init__(
        self,
        file: RuntimeFile,
        names: Sequence[str] | None,
        image_size: int | None,
        preprocessing: Preprocessing | None,
    ) -> None:
        self.file, self.path = file, file.path
        size = input_side(file) or image_size or USUAL_SIDE
        outputs = _try(file, size)
        count = None if names is None else len(names)
        fitting = [
            name
            for name, value in outputs.items()
            if _is_row(value) and value.shape[1] == (count or value.shape[1])
        ]
        if not fitting:
            listed = ", ".join(f"{shown(n, 40)} {list(v.shape)}" for n, v in outputs.items())
            of = "a number for each category" if count is None else f"{count} categories' numbers"
            raise UserError(f"{shown(self.path)}: none of its outputs ({listed}) is {of} an image")
        self._output = fitting[0]
        value = outputs[self._output].astype(np.float64)
        if names is None:
            names = [str(index) for index in range(value.shape[1])]
        self.info = described(file, names, size, outputs)
        sums = value.reshape(len(value), -1).sum(axis=1)
        # Of 8 bits they need not add up to 1.
        self.gives_probabilities = bool((value >= -1e-6).all() and (abs(sums - 1) < 0.1).all())
        self._preprocessing = preprocessing or Preprocessing(
            size, crop=1.0 if size <= _SMALL else USUAL_SIDE / 256
        )
        self.input = _PLAIN

    @property
    def preprocessing(self) -> Preprocessing:
        return self._preprocessing

    def inputs(self) -> list[Input]:
        """Ways in which the graph may want its images."""
        if np.dtype(self.file.input_dtype).kind in "ui" and self.file.grid is None:
            # Pixels, which the graph normalises.
            return [_PLAIN]
        wanted = self.preprocessing
        like_model = Input("normalised as the float model's are", wanted.mean, wanted.std)
        ways = [_PLAIN, like_model, *_OTHERS]
        first = {(way.mean, way.std): way for way in reversed(ways)}
        return [way for way in ways if first[way.mean, way.std] is way]

    def choose_input(self, pixels: Tensor, reference: Tensor) -> None:
        """Take the input for which the file is closest to its float model.

        Args:
            pixels: a few images, float32 `(n, 3, h, w)` in [0, 1].
            reference: the float model's logits for them, `(n, classes)`.
        """
        self._choose(pixels, lambda logits: -float(divergences(logits, reference).mean()))

    def choose_input_by_labels(self, pixels: Tensor, labels: Tensor) -> None:
        """Take the input for which the file is right most often; `labels` is `(n,)`."""
        self._choose(pixels, lambda logits: float((logits.argmax(dim=1) == labels).float().mean()))

    def take_usual_input(self) -> None:
        """Where nothing tells: that of most files on ImageNet, or pixels where it takes these."""
        self.input = next((way for way in self.inputs() if way.std == IMAGENET_STD), _PLAIN)

    def _choose(self, pixels: Tensor, good: Callable[[Tensor], float]) -> None:
        scores = []
        ways = self.inputs()
        for self.input in ways:
            score = good(self.classify(pixels))
            scores.append(score if score == score else float("-inf"))
        self.input = ways[int(np.argmax(scores))]

    def as_input(self, images: np.ndarray) -> np.ndarray:
        shape = (1, 3, 1, 1)
        mean, std = (
            np.array(values, np.float32).reshape(shape)
            for values in (self.input.mean, self.input.std)
        )
        return (images - mean) / std

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return run_in_batches(self.file, self.as_input(images))

    def classify(self, images: Tensor) -> Tensor:
        value = self.run(images.detach().cpu().numpy())[self._output].astype(np.float32)
        rows = torch.from_numpy(value).flatten(1)
        return rows.clamp_min(_LEAST).log() if self.gives_probabilities else rows

"""How `dfq verify` compares files of classifiers: by the categories that they find likeliest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.calibration_set import CalibrationSet
from ..data.class_set import open_photo_set
from ..data.cropped_images import CroppedImages
from ..data.pixels import Pixels
from ..data.training_images import classes_or_photos
from ..errors import UserError, shown
from ..evaluation.class_prediction import require_finite
from ..evaluation.classification import BATCH_SIZE, figures_of, logits_of, paired_interval, top
from ..export.class_files import ForeignClassifier
from ..export.class_movement import ClassAccuracy, ClassMoved, moved_classes
from ..export.exported import ExportedModel
from ..export.opening import RuntimeFile
from ..export.verify import Verification
from ..models.classifying import Classifying
from ..runtime.files import user_path
from ..runtime.progress import Progress
from .verifying import DIAGNOSIS_IMAGES, Compared, Comparing, Origin, said_of, scenes

FEWEST = 20
"""Of fewer images, shares say nothing."""

LEAST_SAME = 0.75
"""Share of the float model's likeliest categories that anyone's file has to have too."""

TRIED = 64
"""Labelled images that tell how a float file wants its input."""


@dataclass(frozen=True)
class Squares:
    """Images as a classifier takes them.

    Attributes:
        pixels: the images.
        indices: those of them that are looked at.
        labels: of each of these its category, int64; None where they have none.
        by_position: whether categories were matched by position.
        names: of the set's categories; none where it has none.
    """

    pixels: Pixels
    indices: Sequence[int]
    labels: Tensor | None = None
    by_position: bool = False
    names: Sequence[str] = ()

    def head(self, count: int) -> Tensor:
        """The first images, float32 `(n, 3, s, s)` in [0, 1]."""
        return self.pixels.load(list(self.indices[:count])).float() / 255


def open_squares(data: str | Path, like: Classifying, size: int) -> Squares:
    """What the user named to compare on.

    Args:
        data: class folders, photos or a calibration set, whose labels do not count: they were
            drawn.
        like: whose preprocessing and categories count.
        size: side in pixels.

    Raises:
        UserError: there are no images, they are of other categories, or of another size.
    """
    path = user_path(data)
    if CalibrationSet.is_one(path):
        made = CalibrationSet.open(path).require_intact()
        return _of_size(Squares(made, range(len(made))), size, shown(path))
    images = CroppedImages(classes_or_photos(path), like, size)
    if not images.images.names:
        return Squares(images, range(len(images)))
    return Squares(images, *images.labelled(), images.by_position, images.images.names)


def _of_size(squares: Squares, size: int, where: str) -> Squares:
    side = squares.pixels.load([0]).shape[-1]
    if side != size:
        raise UserError(
            f"{where}: its images are {side} x {side}, and the file takes {size} x {size}; give "
            "photos, or make a set with dfq synthesize --image-size"
        )
    return squares


class ComparingClassifiers(Comparing):
    """By logits: which category is likeliest, and how sure."""

    def foreign(self, file: RuntimeFile, like: Any | None) -> ForeignClassifier:
        if like is None:
            return ForeignClassifier(file, None, None, None)
        return ForeignClassifier(file, list(like.names), like.image_size, like.preprocessing)

    @contextlib.contextmanager
    def images(
        self, data: str | Path | None, origin: Origin, model: ExportedModel
    ) -> Iterator[tuple[Squares, str]]:
        like: Any = origin.model
        size = model.image_size
        if data is not None:
            yield open_squares(data, like, size), shown(data)
            return
        for folder in origin.sets:
            # Of a run of another size.
            with contextlib.suppress(UserError):
                squares = open_squares(folder, like, size)
                some = Squares(squares.pixels, squares.indices[:DIAGNOSIS_IMAGES])
                break
        else:
            with scenes(size) as (drawn, said):
                photos = CroppedImages(open_photo_set(drawn), like, size)
                yield Squares(photos, range(len(photos))), said
            return
        yield some, said_of(folder)

    def few(self, images: Squares, count: int, model: ExportedModel) -> np.ndarray:
        return images.head(count).numpy()

    def compare(
        self,
        verification: Verification,
        model: Any,
        compared: Compared,
        images: Squares,
        named: bool,
        told: Progress,
    ) -> None:
        other = compared.other
        other.check_size(model.image_size)
        if isinstance(other, ForeignClassifier):
            self._input_of_float(other, images, verification)
        if isinstance(model, ForeignClassifier):
            some = images.head(16)
            model.choose_input(some, other.classify(some))
            if len(model.inputs()) > 1:
                verification.notes.append(
                    f"its input: images {model.input.words}, for which it is closest to the "
                    "float model"
                )
        models = [model, other]
        if compared.reference is not None and compared.origin.manifest is not None:
            models.append(compared.reference)
        ours, theirs, *again = self._logits(models, images, told)
        names = list(other.names)
        if images.by_position and names == [str(index) for index in range(len(names))]:
            # Neither file says what its categories are.
            names = list(images.names)
        plain = [m for m in (model, other) if getattr(m, "gives_probabilities", False)]
        verification.moved = moved_classes(
            require_finite(theirs, other.source),
            ours.nan_to_num(),
            names,
            compared.words,
            as_logits=not plain,
        )
        if not bool(ours.isfinite().all()):
            verification.faults.append("outputs: some of its logits are not finite")
        if not named or images.labels is None:
            return
        labels = images.labels
        figures, _ = figures_of(top(ours), labels)
        right_float = theirs.argmax(dim=1) == labels
        right_reference = between = None
        if compared.reference is not None:
            right_reference = again[0].argmax(dim=1) == labels if again else right_float
            between = paired_interval(ours.argmax(dim=1) == labels, right_reference)
        verification.accuracy = ClassAccuracy(
            verification.images,
            len(labels),
            **figures,
            reference_top1=None if right_reference is None else _share(right_reference),
            float_top1=None if compared.model is None else _share(right_float),
            difference=between,
            by_position=images.by_position,
        )

    def faults(
        self, verification: Verification, model: Any, compared: Compared, few: np.ndarray
    ) -> list[str]:
        moved = verification.moved
        assert isinstance(moved, ClassMoved)
        if moved.images < FEWEST or not isinstance(model, ForeignClassifier):
            return []
        if moved.share >= LEAST_SAME:
            return []
        return [
            f"predictions: in {moved.share:.1%} of {moved.images} images it finds the "
            f"{moved.against}'s likeliest category, and {LEAST_SAME:.0%} should be"
        ]

    def _input_of_float(
        self, model: ForeignClassifier, images: Squares, verification: Verification
    ) -> None:
        """Find out how a float file that says nothing of itself wants its images."""
        if len(model.inputs()) < 2:
            return
        if images.labels is None:
            model.take_usual_input()
            how = "as is usual: give --data with labels to find out, or the float model itself"
        else:
            # From all over the set, which is in the order of its categories.
            count = len(images.indices)
            places = np.linspace(0, count - 1, min(TRIED, count)).astype(int).tolist()
            pixels = images.pixels.load([images.indices[place] for place in places])
            model.choose_input_by_labels(pixels.float() / 255, images.labels[places])
            how = "for which it is right most often"
        verification.notes.append(f"the float file's input: images {model.input.words}, {how}")

    def _logits(self, models: Sequence[Any], images: Squares, told: Progress) -> list[Tensor]:
        """Of each model, for all images: `(n, classes)`."""
        rows: list[list[Tensor]] = [[] for _ in models]
        count = len(images.indices)
        with told.task("classification", count, "images") as task:
            for start in range(0, count, BATCH_SIZE):
                batch = images.pixels.load(list(images.indices[start : start + BATCH_SIZE]))
                for model, logits in zip(models, rows, strict=True):
                    logits.append(logits_of(model, batch))
                task.update(min(start + BATCH_SIZE, count), count)
        return [torch.cat(logits) for logits in rows]


def _share(right: Tensor) -> float:
    return int(right.sum()) / len(right)

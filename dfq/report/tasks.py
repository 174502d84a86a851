"""What a page says and shows of a detector's run, and what of a classifier's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.calibration_set import CalibrationSet
from ..data.cropped_images import CroppedImages
from ..data.pixels import LabelledImages
from ..data.statistics import Objects, Summary, summarize
from ..data.training_images import LetterboxedImages
from ..models.detecting import Task
from . import figures
from .class_pictures import class_pairs_on_photos, class_pairs_on_squares, class_tiles
from .figures import Chart
from .pictures import Pair, Tile, pairs_on_photos, pairs_on_squares, set_tiles

_INTEGERS = (
    "The run's <code>model.safetensors</code> stores these weights as integers; what a runtime "
    "computes in integers is an exported file (<code>dfq export</code>)."
)


class TaskPage(ABC):
    """What of the page depends on the task.

    Attributes:
        noun: what the network is called.
        metric: what epochs are chosen by.
        figures_note: below the table of figures, HTML.
        pairs_note: above images with what both networks say.
        sure: which images of a synthetic set come first.
        in_float: what is computed in float whatever the policy.
        counted: what the set's categories are counted in.
    """

    noun: str
    metric: str
    figures_note: str
    pairs_note: str
    sure: str
    in_float: str
    counted: str

    @abstractmethod
    def objects(self, data: LabelledImages) -> Objects | None:
        """The labels of a run's set; None for a set of the other task."""

    @abstractmethod
    def overview(self, summary: Summary) -> list[tuple[str, str]]:
        """What there is to say of a labelled set, beside images and pixels."""

    @abstractmethod
    def charts(self, objects: Objects) -> list[Chart]:
        """Of a labelled set."""

    @abstractmethod
    def tiles(self, data: LabelledImages, names: Sequence[str]) -> list[Tile]:
        """Some images of a set."""

    @abstractmethod
    def pairs_on_squares(
        self, before: Any, after: Any, data: LabelledImages, indices: Sequence[int]
    ) -> list[Pair]:
        """Some images of a set, with what both networks say."""

    @abstractmethod
    def pairs_on_photos(
        self, before: Any, after: Any, photos: Any, image_size: int | None
    ) -> list[Pair]:
        """The same of photos."""


class _DetectorPage(TaskPage):
    noun, metric = "detector", "AP"
    figures_note = (
        "AP is COCO's, from 0 to 1. A detection of the float network with a score above 0.3 is "
        "kept where this network has one of the same category there, with an overlap (IoU) of at "
        f"least 0.5. {_INTEGERS}"
    )
    pairs_note = (
        "the first images in which the float network detects something, with detections whose "
        "score is above 0.3"
    )
    sure = "first those that have a label of which the network is sure (score above 0.3)"
    in_float = "Biases, activation functions, resizing and the decoding of predictions"
    counted = "Objects"

    def objects(self, data: LabelledImages) -> Objects | None:
        if isinstance(data, LetterboxedImages):
            return Objects.of(data.images)
        return Objects.of(data) if isinstance(data, CalibrationSet) else None

    def overview(self, summary: Summary) -> list[tuple[str, str]]:
        rows = [
            ("Objects", f"{summary.objects}"),
            ("Objects an image", f"{summary.objects / summary.images:.2f}"),
            ("Categories that occur", f"{len(summary.categories)}"),
            ("Small (under 32 × 32 px)", f"{summary.by_size['small']}"),
            ("Medium", f"{summary.by_size['medium']}"),
            ("Large (over 96 × 96 px)", f"{summary.by_size['large']}"),
        ]
        if summary.mean_score is not None:
            rows.append(("Mean score of the labels", f"{summary.mean_score:.3f}"))
        return rows

    def charts(self, objects: Objects) -> list[Chart]:
        sides = np.sqrt(objects.sides.prod(axis=1))
        charts = [
            figures.histogram("side", "Box sizes", sides, "root of the box's area, pixels"),
            figures.histogram(
                "count", "Objects an image", objects.counts.astype(float), "objects", whole=True
            ),
        ]
        if objects.scores is not None:
            title = "How sure the float network is of the labels"
            charts.append(figures.histogram("score", title, objects.scores, "score"))
        return charts

    def tiles(self, data: LabelledImages, names: Sequence[str]) -> list[Tile]:
        return set_tiles(data, names)

    def pairs_on_squares(
        self, before: Any, after: Any, data: LabelledImages, indices: Sequence[int]
    ) -> list[Pair]:
        return pairs_on_squares(before, after, data, indices)

    def pairs_on_photos(
        self, before: Any, after: Any, photos: Any, image_size: int | None
    ) -> list[Pair]:
        return pairs_on_photos(before, after, photos, image_size)


class _ClassifierPage(TaskPage):
    noun, metric = "classifier", "top-1 accuracy"
    figures_note = (
        "Accuracies and F1 are from 0 to 1. Top-1 is the share of the images whose likeliest "
        "category is theirs, top-5 of those whose category is among the five likeliest. "
        f"{_INTEGERS}"
    )
    pairs_note = "the first images, with the likeliest category and its probability"
    sure = "the first ones, with the category that each was made for"
    in_float = "Biases and activation functions"
    counted = "Images"

    def objects(self, data: LabelledImages) -> Objects | None:
        if isinstance(data, CalibrationSet):
            return Objects.of(data)
        if not isinstance(data, CroppedImages):
            return None
        labels = [data.label(index) for index in range(len(data))]
        categories = np.array([label for label in labels if label is not None], np.int64)
        labelled = bool(data.images.names)
        count = len(data.names) if labelled else 0
        return Objects(
            names=list(data.names) if labelled else [],
            sizes=np.full((len(data), 2), data.size, np.int64),
            counts=np.array([int(label is not None) for label in labels], np.int64),
            categories=categories[categories < count],
            sides=np.full((len(categories), 2), float(data.size)),
            scores=None,
            labelled=labelled,
        )

    def overview(self, summary: Summary) -> list[tuple[str, str]]:
        rows = [("Categories that occur", f"{len(summary.categories)}")]
        if summary.mean_score is not None:
            rows.append(("Mean probability of the labels", f"{summary.mean_score:.3f}"))
        return rows

    def charts(self, objects: Objects) -> list[Chart]:
        if objects.scores is None:
            return []
        title = "How sure the float network is of the labels"
        return [figures.histogram("score", title, objects.scores, "probability")]

    def tiles(self, data: LabelledImages, names: Sequence[str]) -> list[Tile]:
        return class_tiles(data, names)

    def pairs_on_squares(
        self, before: Any, after: Any, data: LabelledImages, indices: Sequence[int]
    ) -> list[Pair]:
        return class_pairs_on_squares(before, after, data, indices)

    def pairs_on_photos(
        self, before: Any, after: Any, photos: Any, image_size: int | None
    ) -> list[Pair]:
        return class_pairs_on_photos(before, after, photos, image_size)


PAGES: Mapping[Task, TaskPage] = {
    "detection": _DetectorPage(),
    "classification": _ClassifierPage(),
}


def summary_of(page: TaskPage, objects: Objects) -> list[tuple[str, str]]:
    """What there is to say of a set, row by row."""
    summary = summarize(objects)
    width, height, _ = summary.sizes[0]
    size = f"{width} × {height}"
    if len(summary.sizes) > 1:
        size += f" and {len(summary.sizes) - 1} other sizes"
    rows = [("Images", f"{summary.images}"), ("Pixels", size)]
    return [*rows, *page.overview(summary)] if summary.labelled else rows

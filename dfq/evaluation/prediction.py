"""What a detector found in images, for people, JSON and other libraries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pycocotools import mask as coco_mask

from ..data.image_set import usable
from ..errors import UserError, shown
from ..models.base import Detections
from .agreement import SAME_BOX, Kept, kept_of
from .prediction_list import PredictionList

if TYPE_CHECKING:
    import supervision

KIND = "dfq detections"
"""What `detections.json` says that it is."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a detector found in one image.

    Attributes:
        file: the image, as it was named or found.
        width, height: of it, pixels, EXIF orientation applied.
        boxes: float32 `(n, 4)`, x1 y1 x2 y2 in pixels of the image.
        scores: float32 `(n,)` in [0, 1], descending.
        labels: int64 `(n,)`, category indices into `names`.
        names: category names of the detector, by index.
        segments: of each detection its instance mask as COCO's run lengths; None where the detector
            predicts none.
        reference: what the float detector found, where one was named to compare with.
    """

    file: str
    width: int
    height: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: Sequence[str]
    segments: tuple[dict[str, Any], ...] | None = None
    reference: Prediction | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def categories(self) -> list[str]:
        """The category name of each detection."""
        return [self.names[label] for label in self.labels.tolist()]

    def masks(self) -> np.ndarray | None:
        """Instance masks, bool `(n, height, width)`; None where the detector predicts none."""
        if self.segments is None:
            return None
        masks = np.zeros((len(self), self.height, self.width), bool)
        for index, segment in enumerate(self.segments):
            masks[index] = coco_mask.decode(segment).astype(bool)
        return masks

    def to_supervision(self) -> supervision.Detections:
        """The detections as the `supervision` library takes them, for its trackers, zones and
        annotators: `xyxy`, `confidence`, `class_id`, the category names in `data['class_name']`,
        and `mask` where there are masks.

        Raises:
            UserError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UserError(
                "supervision is not installed, which this hands detections to: "
                "pip install supervision"
            ) from None
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            mask=self.masks(),
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            data={"class_name": np.array(self.categories, dtype=str)},
        )

    def kept(self) -> Kept | None:
        """How many of the float detector's detections are among these; None without one. See
        `dfq.evaluation.agreement.Kept`; all that were found above the threshold count."""
        return None if self.reference is None else _kept([self])

    def lines(self) -> list[str]:
        """For people: a row a detection."""
        count = f"{len(self)} detections" if len(self) != 1 else "1 detection"
        names = [shown(name, limit=40) for name in self.categories]
        width = max(map(len, names), default=0)
        rows = [f"{shown(self.file)} ({self.width} x {self.height}): {count}"]
        for name, score, box in zip(names, self.scores.tolist(), self.boxes.tolist(), strict=True):
            corners = " ".join(f"{value:8.1f}" for value in box)
            rows.append(f"  {name:<{width}}  {score:.2f}  {corners}")
        return rows

    def comparison(self) -> str:
        """For people: how much of it the float detector found too."""
        return agreed(counts([self]))

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; the masks as COCO's run lengths."""
        document: dict[str, Any] = {
            "file": self.file,
            "width": self.width,
            "height": self.height,
            "detections": self._rows(),
        }
        if self.reference is not None:
            document["compare"] = {**counts([self]), "float": self.reference._rows()}
        return document

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [
            {"category": name, "index": label, "score": score, "box": box}
            for name, label, score, box in zip(
                self.categories,
                self.labels.tolist(),
                self.scores.tolist(),
                self.boxes.tolist(),
                strict=True,
            )
        ]
        for row, segment in zip(rows, self.segments or (), strict=False):
            row["mask"] = {**segment, "counts": segment["counts"].decode("ascii")}
        return rows


@dataclass(eq=False, repr=False, kw_only=True)
class Predictions(PredictionList[Prediction]):
    """A list of one `Prediction` for each image that could be read; see `PredictionList`.

    Attributes:
        threshold: detections with a lower score are left out.
    """

    kind: ClassVar[str] = KIND
    threshold: float

    def kept(self) -> Kept | None:
        """How many of the float detector's detections these are; None without one."""
        return None if self.compared is None else _kept(self)

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def counts(self) -> dict[str, Any]:
        return counts(self)

    def summary(self) -> str:
        total = sum(map(len, self))
        return f"{total} detections with a score of {self.threshold:g} or more"

    def comparison(self) -> str:
        return f"in all {agreed(self.counts())}: same category, IoU at least {SAME_BOX}"


def prediction(
    file: str,
    size: tuple[int, int],
    detections: Detections,
    names: Sequence[str],
    segments: Sequence[Any] | None = None,
) -> Prediction:
    """What was found, without boxes that are none: not finite, or without an extent.

    Args:
        file: the image.
        size: its width and height, pixels.
        detections: in its pixels, on the CPU.
        names: category names by index.
        segments: masks of the first detections; None where the detector predicts none.
    """
    scores = detections.scores.numpy().astype(np.float32)
    rows = usable(detections.boxes.numpy()) & np.isfinite(scores)
    shapes = None
    if segments is not None:
        empty = coco_mask.encode(np.zeros((size[1], size[0]), np.uint8, order="F"))
        whole = [*segments, *[empty] * (len(rows) - len(segments))]
        shapes = tuple(shape for shape, row in zip(whole, rows, strict=True) if row)
    return Prediction(
        file,
        *size,
        detections.boxes.numpy().astype(np.float32)[rows],
        scores[rows],
        detections.labels.numpy().astype(np.int64)[rows],
        names,
        shapes,
    )


def counts(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Of images that were compared: how much the float detector found, how much this one, how many
    detections are in both, and how far the scores of those shifted (None where there are none), as
    JSON has it."""
    kept = _kept(predictions)
    return {
        "float_detections": kept.objects,
        "detections": sum(map(len, predictions)),
        "agree": kept.kept,
        "score_shift": kept.score_shift,
    }


def agreed(counted: dict[str, Any]) -> str:
    """What `counts` gives, for people."""
    return (
        f"{counted['agree']} agree (float network: {counted['float_detections']}, "
        f"this one: {counted['detections']})"
    )


def _kept(predictions: Sequence[Prediction]) -> Kept:
    pairs = [
        (prediction.reference, prediction)
        for prediction in predictions
        if prediction.reference is not None
    ]
    references = [_detections(reference) for reference, _ in pairs]
    # All that was found is above the threshold that the user set.
    return kept_of(
        references, [_detections(prediction) for _, prediction in pairs], above=-math.inf
    )


def _detections(prediction: Prediction) -> Detections:
    return Detections(
        *map(torch.from_numpy, (prediction.boxes, prediction.scores, prediction.labels))
    )

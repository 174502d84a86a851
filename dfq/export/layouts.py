"""Outputs of anyone's detection files: which of the usual layouts they are in, and the detections
in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from ..errors import UserError, shown
from ..models.base import Detections
from .exported import ExportedDetector, ExportInfo
from .opening import RuntimeFile

_FORMATS = {".onnx": "onnx", ".xml": "openvino", ".tflite": "litert", ".pt2": "torch"}
_MOST_BOXES = 30_000
_MOST_CHOSEN = 1000
"""End-to-end networks give no more detections than this."""


@dataclass(frozen=True)
class Candidates:
    """What a file gives before non-maximum suppression, or behind its own.

    Attributes:
        boxes: float `(n, A, 4)`, x1 y1 x2 y2 in pixels of the network's input.
        scores: float `(n, A, classes)`; `(n, A, 1)` where `labels` are given.
        labels: int64 `(n, A)` where the file has chosen already; else None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray | None = None


def candidates(outputs: dict[str, np.ndarray], classes: int | None, side: int) -> Candidates | None:
    """What the outputs of a file hold; None where they are in no layout that is known.

    Known are: Ultralytics' `(n, 4 + classes, A)`, YOLOv5's `(n, A, 5 + classes)`, both also
    transposed and with mask coefficients behind; end-to-end `(n, A, 6)`; boxes and scores apart,
    `(n, A, 4)` and `(n, A, classes)`, also transposed; boxes, scores and labels apart.

    Args:
        outputs: by name.
        classes: how many categories there are; None: as many as the layout says.
        side: of the input in pixels: boxes may be shares of it.
    """
    values = {name: value for name, value in outputs.items() if value.ndim in (2, 3)}
    if len(values) == 1 or (len(values) != len(outputs) and _widest(values) is not None):
        name = _widest(values)
        return None if name is None else _together(values[name].astype(np.float32), classes, side)
    return _apart(values, classes, side)


def _widest(values: dict[str, np.ndarray]) -> str | None:
    names = [name for name, value in values.items() if value.ndim == 3]
    return max(names, key=lambda name: values[name].size, default=None)


def _together(value: np.ndarray, classes: int | None, side: int) -> Candidates | None:
    rows = _rows(value, classes)
    if rows is None:
        return None
    width = rows.shape[2]
    if width == 6 and _is_chosen(rows, classes):
        boxes = _pixels(rows[..., :4], side)
        return Candidates(boxes, rows[..., 4:5], rows[..., 5].round().astype(np.int64))
    if classes is None:
        # Ultralytics' has its channels first.
        objectness = value.shape[1] > value.shape[2]
        classes = width - (5 if objectness else 4)
    elif width == 5 + classes:
        objectness = True
    elif width == 4 + classes or width == 4 + classes + 32:
        objectness = False
    elif width == 5 + classes + 32:
        objectness = True
    else:
        return None
    first = 5 if objectness else 4
    scores = rows[..., first : first + classes]
    if objectness:
        scores = scores * rows[..., 4:5]
    return Candidates(_pixels(_corners(rows[..., :4]), side), scores)


def _rows(value: np.ndarray, classes: int | None) -> np.ndarray | None:
    """`(n, A, width)`."""
    if classes is not None:
        widths = {6, 4 + classes, 5 + classes, 36 + classes, 37 + classes}
        last, middle = value.shape[2] in widths, value.shape[1] in widths
        if last and (not middle or value.shape[1] >= value.shape[2]):
            return value
        return value.transpose(0, 2, 1) if middle else None
    if min(value.shape[1:]) < 5:
        return None
    return value if value.shape[1] >= value.shape[2] else value.transpose(0, 2, 1)


def _is_chosen(rows: np.ndarray, classes: int | None) -> bool:
    """Whether rows of six are boxes, a score and a category, and not two categories."""
    if rows.shape[1] > _MOST_CHOSEN or (classes in (1, 2) and rows.shape[1] > 300):
        return False
    boxes, labels = rows[..., :4], rows[..., 5]
    ordered = (boxes[..., 2:] >= boxes[..., :2] - 1e-3).all()
    return bool(ordered and np.array_equal(labels, labels.round()))


def _apart(values: dict[str, np.ndarray], classes: int | None, side: int) -> Candidates | None:
    by_name = {name.lower(): value.astype(np.float32) for name, value in values.items()}
    boxes_name = next(
        (n for n, v in by_name.items() if v.ndim == 3 and 4 in v.shape[1:] and "box" in n), None
    ) or next((n for n, v in by_name.items() if v.ndim == 3 and 4 in v.shape[1:]), None)
    if boxes_name is None:
        return None
    boxes = by_name.pop(boxes_name)
    if boxes.shape[2] != 4:
        boxes = boxes.transpose(0, 2, 1)
    count = boxes.shape[1]
    scores = next((v for v in by_name.values() if v.ndim == 3 and count in v.shape[1:]), None)
    if scores is not None:
        if scores.shape[1] != count:
            scores = scores.transpose(0, 2, 1)
        if classes is not None and scores.shape[2] != classes:
            return None
        return Candidates(_pixels(_corners(boxes), side), scores)
    flat = [value for value in by_name.values() if value.shape[1:] == (count,)]
    integral = [np.array_equal(value, value.round()) for value in flat]
    if len(flat) < 2 or sorted(integral)[:2] == [True, True]:
        return None
    score = flat[integral.index(False)]
    label = flat[integral.index(True)] if True in integral else None
    if label is None:
        return None
    return Candidates(_pixels(_corners(boxes), side), score[..., None], label.astype(np.int64))


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Corners of boxes that are corners already, or centre and size."""
    share = float((boxes[..., 2:] >= boxes[..., :2] - 1e-3).all(axis=-1).mean())
    if share > 0.98:
        return boxes
    half = boxes[..., 2:] / 2
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)


def _pixels(boxes: np.ndarray, side: int) -> np.ndarray:
    """Boxes in pixels, which may be shares of the side."""
    return boxes * side if boxes.size and np.abs(boxes).max() <= 4 else boxes


def choose(
    predictions: Candidates,
    score_threshold: float = 0.001,
    iou_threshold: float = 0.6,
    max_detections: int = 300,
) -> list[Detections]:
    """Detections, one an image: non-maximum suppression within each category, unless the file has
    chosen itself; thresholds are those of `Detector.decode`."""
    detections = []
    for index in range(len(predictions.boxes)):
        boxes = torch.from_numpy(predictions.boxes[index])
        scores = torch.from_numpy(predictions.scores[index])
        if predictions.labels is None:
            rows, labels = (scores > score_threshold).nonzero(as_tuple=True)
            kept_scores = scores[rows, labels]
        else:
            rows = (scores[:, 0] > score_threshold).nonzero()[:, 0]
            labels, kept_scores = torch.from_numpy(predictions.labels[index])[rows], scores[rows, 0]
        order = kept_scores.argsort(descending=True, stable=True)[:_MOST_BOXES]
        rows, labels, kept_scores = rows[order], labels[order], kept_scores[order]
        if predictions.labels is None:
            keep = batched_nms(boxes[rows].float(), kept_scores.float(), labels, iou_threshold)
        else:
            keep = torch.arange(len(kept_scores))
        keep = keep[:max_detections]
        detections.append(Detections(boxes[rows][keep], kept_scores[keep], labels[keep]))
    return detections


def input_side(file: RuntimeFile) -> int | None:
    """Side in pixels of the square images that anyone's file takes; None: any.

    Raises:
        UserError: its input is no batch of square images.
    """
    sides = [side for side in file.input_shape[1:] if side != 3]
    if len(file.input_shape) != 4 or 3 not in (file.input_shape[1], file.input_shape[3]):
        raise UserError(
            f"{shown(file.path)}: its input {file.input_shape} is no batch of RGB images"
        )
    if len(set(sides)) > 1:
        raise UserError(
            f"{shown(file.path)}: takes images of {sides[1]} x {sides[0]}; dfq compares "
            "files of square images"
        )
    return sides[0] if sides else 3


def described(
    file: RuntimeFile, names: Sequence[str], size: int, outputs: Iterable[str]
) -> ExportInfo:
    """What there is to say of anyone's file.

    Args:
        file: opened.
        names: categories.
        size: side in pixels.
        outputs: their names.
    """
    fixed = input_side(file)
    return ExportInfo(
        format=_FORMATS[file.path.suffix.lower()],
        runtime=file.runtime,
        family="unknown",
        names=list(names),
        image_size=size,
        stride=1 if fixed is not None else 32,
        dynamic=fixed is None,
        batch=file.input_shape[0],
        precision="unknown",
        checkpoint="",
        source=str(file.path),
        letterbox="centred",
        normalisation="unknown",
        outputs=dict.fromkeys(outputs, "as the file has it"),
        spec={},
    )


def run_in_batches(file: RuntimeFile, images: np.ndarray) -> dict[str, np.ndarray]:
    """A file's outputs by name, of any number of images float32 `(n, 3, h, w)`."""
    fixed = file.input_shape[0] or len(images)
    rows = []
    for start in range(0, len(images), fixed):
        part = images[start : start + fixed]
        full_batch = np.concatenate([part, np.repeat(part[:1], fixed - len(part), axis=0)])
        rows.append({n: v[: len(part)] for n, v in file.run(full_batch).items()})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


class ForeignModel(ExportedDetector):
    """Anyone's detection file, float or quantized.

    Args:
        file: opened.
        names: categories; None: as the file says or as many as its layout has, by number.
        image_size: side in pixels, for files that take any.

    Raises:
        UserError: its input is no image, or its outputs are in no layout that is known.
    """

    def __init__(
        self, file: RuntimeFile, names: Sequence[str] | None, image_size: int | None
    ) -> None:
        self.file, self.path = file, file.path
        fixed = input_side(file)
        size = fixed or image_size
        if size is None:
            raise UserError(
                f"{shown(self.path)}: takes images of any side; compare it with a model"
            )
        self._batch = file.input_shape[0]
        grey = np.full((self._batch or 1, 3, size, size), 0.45, np.float32)
        self._classes = None if names is None else len(names)
        outputs = file.run(grey)
        predictions = candidates(outputs, self._classes, size)
        if predictions is None:
            listed = ", ".join(f"{shown(n, 40)} {list(v.shape)}" for n, v in outputs.items())
            of = "" if names is None else f" of {len(names)} categories"
            raise UserError(
                f"{shown(self.path)}: its outputs ({listed}) are in no layout{of} that dfq knows: "
                "(n, 4 + classes, A), (n, A, 5 + classes), (n, A, 6), or boxes and scores apart"
            )
        if names is None:
            count = predictions.scores.shape[2] if predictions.labels is None else 1000
            names = [str(index) for index in range(count)]
        self.info = described(file, names, size, outputs)

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return run_in_batches(self.file, images)

    def candidates(self, images: np.ndarray) -> Candidates:
        """What it gives before suppression, of images as for `run`."""
        predictions = candidates(self.run(images), self._classes, images.shape[-1])
        assert predictions is not None
        return predictions

    def detect(self, images: Tensor, *, masks: bool = False, **thresholds: Any) -> list[Detections]:
        return choose(self.candidates(images.detach().cpu().numpy()), **thresholds)

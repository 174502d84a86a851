"""Matching detections with objects, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..dataset.readers import ImageSet
from ..detectors.base import Detections
from ..errors import UserError


def require_labels(imageset: ImageSet) -> None:
    if not imageset.labelled:
        raise UserError(f"{imageset.source}: the set has no labels to measure against")


def match(
    imageset: ImageSet,
    detections: Sequence[Detections],
    names: Sequence[str],
    areas: Sequence[str] = ("all", "small", "medium", "large"),
) -> tuple[COCOeval, list[int]]:
    """pycocotools' matching, and the model's categories in its order."""
    require_labels(imageset)
    if len(detections) != len(imageset):
        raise ValueError(f"{len(detections)} detections for {len(imageset)} images")
    mapping = imageset.category_mapping(names)
    categories = sorted({index for index in mapping if index is not None})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _index(imageset, categories, list(_truth(imageset, mapping)))
        found = _index(imageset, categories, list(_found(imageset, detections, set(categories))))
        evaluator = COCOeval(truth, found, "bbox")
        ranges = dict(zip(evaluator.params.areaRngLbl, evaluator.params.areaRng, strict=True))
        evaluator.params.areaRngLbl = list(areas)
        evaluator.params.areaRng = [ranges[label] for label in areas]
        evaluator.evaluate()
    return evaluator, categories


def _index(imageset: ImageSet, categories: list[int], annotations: list[dict]) -> COCO:
    # Ids start from 1: to pycocotools a match with annotation 0 is no match.
    coco = COCO()
    coco.dataset = {
        "images": [{"id": item.image_id} for item in imageset.items],
        "categories": [{"id": category} for category in categories],
        "annotations": [{"id": number, **row} for number, row in enumerate(annotations, 1)],
    }
    coco.createIndex()
    return coco


def _truth(imageset: ImageSet, mapping: list[int | None]) -> Iterator[dict]:
    for item in imageset.items:
        for box, label, ignore, area in zip(
            item.boxes, item.labels, item.ignore, item.area, strict=True
        ):
            if mapping[label] is not None:
                yield {
                    "image_id": item.image_id,
                    "category_id": mapping[label],
                    "bbox": _xywh(box),
                    "area": float(area),
                    "iscrowd": int(ignore),
                }


def _found(
    imageset: ImageSet, detections: Sequence[Detections], categories: set[int]
) -> Iterator[dict]:
    for item, one in zip(imageset.items, detections, strict=True):
        boxes, scores, labels = (part.cpu().numpy() for part in (one.boxes, one.scores, one.labels))
        # A network that has diverged gives NaN, which would match anything.
        usable = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
        for box, confidence, label in zip(
            boxes[usable], scores[usable], labels[usable], strict=True
        ):
            if int(label) in categories:
                x, y, width, height = _xywh(box)
                yield {
                    "image_id": item.image_id,
                    "category_id": int(label),
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "score": float(confidence),
                    "iscrowd": 0,
                }


def _xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1, y2 - y1]

"""Matching detections with objects, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.outlines import BrokenOutline, Segment
from ..data.readers import ImageSet
from ..errors import UserError
from ..models.base import Detections


def require_labels(imageset: ImageSet) -> None:
    """Refuse a set that has no labels, or none that can be used."""
    if not imageset.labelled:
        raise UserError(f"{imageset.source}: the set has no labels to measure against")
    imageset.require_boxes()


def match(
    imageset: ImageSet,
    detections: Sequence[Detections],
    names: Sequence[str],
    areas: Sequence[str] = ("all", "small", "medium", "large"),
    segments: Sequence[Sequence[Segment]] | None = None,
) -> tuple[COCOeval, list[int]]:
    """pycocotools' matching, and the model's categories in its order.

    Args:
        imageset: a labelled set.
        detections: one an image, in pixels of the original images.
        names: what the detections' labels index.
        areas: names of COCO's area ranges.
        segments: of each image, the masks of its first detections; those, and not the boxes, are
            matched then, and `imageset` states the outline of every object.
    """
    categories, truth, detected = as_annotations(imageset, detections, names, segments)
    images = [
        {"id": item.image_id, "width": item.width, "height": item.height} for item in imageset.items
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(
            indexed(COCO(), images, categories, truth),
            indexed(COCO(), images, categories, detected),
            "bbox" if segments is None else "segm",
        )
        ranges = dict(zip(evaluator.params.areaRngLbl, evaluator.params.areaRng, strict=True))
        evaluator.params.areaRngLbl = list(areas)
        evaluator.params.areaRng = [ranges[label] for label in areas]
        evaluator.evaluate()
    return evaluator, categories


def as_annotations(
    imageset: ImageSet,
    detections: Sequence[Detections],
    names: Sequence[str],
    segments: Sequence[Sequence[Segment]] | None = None,
) -> tuple[list[int], list[dict], list[dict]]:
    """The model's categories that the set has, and its objects and the detections of these as
    COCO's annotations.

    Args:
        imageset, detections, names, segments: as for `match`.

    Raises:
        UserError: the set is unlabelled, or shares no category with `names`.
        ValueError: there are not as many detections as images.
    """
    require_labels(imageset)
    if len(detections) != len(imageset):
        raise ValueError(f"{len(detections)} detections for {len(imageset)} images")
    mapping = imageset.category_mapping(names)
    categories = sorted({index for index in mapping if index is not None})
    detected = _detected(imageset, detections, set(categories), segments)
    return categories, list(_truth(imageset, mapping)), list(detected)


def indexed(coco: Any, images: list[dict], categories: list[int], rows: list[dict]) -> Any:
    """An empty COCO data set, pycocotools' or one that is used alike, filled."""
    # Ids start from 1: to pycocotools a match with annotation 0 is no match.
    coco.dataset = {
        "images": images,
        "categories": [{"id": category} for category in categories],
        "annotations": [{"id": number, **row} for number, row in enumerate(rows, 1)],
    }
    coco.createIndex()
    return coco


def _truth(imageset: ImageSet, mapping: list[int | None]) -> Iterator[dict]:
    for item in imageset.items:
        segments = item.segments or (None,) * len(item.boxes)
        for box, label, ignore, area, segment in zip(
            item.boxes, item.labels, item.ignore, item.area, segments, strict=True
        ):
            if mapping[label] is not None:
                yield {
                    "image_id": item.image_id,
                    "category_id": mapping[label],
                    "bbox": _xywh(box),
                    "area": float(area),
                    "iscrowd": int(ignore),
                    "segmentation": None if isinstance(segment, BrokenOutline) else segment,
                }


def _detected(
    imageset: ImageSet,
    detections: Sequence[Detections],
    categories: set[int],
    segments: Sequence[Sequence[Segment]] | None,
) -> Iterator[dict]:
    for index, (item, image_detections) in enumerate(zip(imageset.items, detections, strict=True)):
        boxes = image_detections.boxes.cpu().numpy()
        scores = image_detections.scores.cpu().numpy()
        labels = image_detections.labels.cpu().numpy()
        # A network that has diverged gives NaN, which would match anything.
        usable = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
        if segments is not None:
            usable[len(segments[index]) :] = False
        for row in np.flatnonzero(usable).tolist():
            confidence, label = scores[row], labels[row]
            if int(label) in categories:
                x, y, width, height = _xywh(boxes[row])
                area, shape = width * height, {}
                if segments is not None:
                    shape = {"segmentation": segments[index][row]}
                    area = float(coco_mask.area(segments[index][row]))
                yield {
                    **shape,
                    "image_id": item.image_id,
                    "category_id": int(label),
                    "bbox": [x, y, width, height],
                    "area": area,
                    "score": float(confidence),
                    "iscrowd": 0,
                }


def _xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1, y2 - y1]

"""Precision and recall as pycocotools accumulates them, to the last bit, by faster-coco-eval: the
same in C++, several times as fast.

pycocotools stays the reference, and tests compare the two. They differ in one place. pycocotools
divides by the number of detections so far plus 2^-52, which is lost beside any number but one: a
precision of one right detection out of one is 1 - 2^-52 to it, of two out of two 1. Which of the
two an entry of 1 stands for is asked of the evaluation itself, see `_as_pycocotools`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from ..data.outlines import Segment
from ..data.readers import ImageSet
from ..models.base import Detections
from .coco_matching import as_annotations, indexed


@dataclass(frozen=True)
class Accumulated:
    """What COCO's evaluation accumulates, with at most 100 detections an image and category.

    Attributes:
        precision: float64 `(IoU thresholds, 101 recalls, categories, areas)`, -1 where there is
            nothing to find.
        recall: float64 `(IoU thresholds, categories, areas)`, so too.
        iou: the IoU thresholds, 0.5 to 0.95.
        categories: the model's categories.
        areas: names of the area ranges.
    """

    precision: np.ndarray
    recall: np.ndarray
    iou: list[float]
    categories: list[int]
    areas: list[str]


def accumulate(
    imageset: ImageSet,
    detections: Sequence[Detections],
    names: Sequence[str],
    segments: Sequence[Sequence[Segment]] | None = None,
) -> Accumulated:
    """COCO's precision and recall of given detections.

    Args:
        imageset: a labelled set.
        detections: one an image, in pixels of the original images.
        names: what the detections' labels index.
        segments: as for `coco_matching.match`.

    Raises:
        UserError: the set is unlabelled, or shares no category with `names`.

    Example:
        >>> figures = accumulate(imageset, predict(detector, imageset), detector.names)
        >>> figures.precision[figures.iou.index(0.5), ..., figures.areas.index("all")].mean()
    """
    categories, truth, detected = as_annotations(imageset, detections, names, segments)
    # Images by their place in the order of their ids: ids go through float64, which does not hold
    # all of them.
    ids = sorted(item.image_id for item in imageset.items)
    place = {image_id: number for number, image_id in enumerate(ids)}
    for row in (*truth, *detected):
        row["image_id"] = place[row["image_id"]]
    images = [
        {"id": place[item.image_id], "width": item.width, "height": item.height}
        for item in imageset.items
    ]
    evaluator = COCOeval_faster(
        indexed(COCO(), images, categories, truth),
        indexed(COCO(), images, categories, detected),
        "bbox" if segments is None else "segm",
        print_function=lambda *_: None,
    )
    params = evaluator.params
    params.maxDets = params.maxDets[-1:]
    objects = _objects(truth, categories, params.areaRng)
    recalls = params.recThrs
    # Between one object found and two, for each number of objects there is.
    between = 1.5 / np.maximum(objects, 1)
    params.recThrs = np.unique(np.concatenate([recalls, between.ravel()]))
    evaluator.evaluate()
    evaluator.accumulate()
    precision = np.asarray(evaluator.eval["precision"])[..., -1]
    return Accumulated(
        precision=_as_pycocotools(precision, params.recThrs, recalls, between, objects),
        recall=np.asarray(evaluator.eval["recall"])[..., -1],
        iou=[round(float(value), 2) for value in params.iouThrs],
        categories=categories,
        areas=list(params.areaRngLbl),
    )


def _objects(
    truth: list[dict], categories: list[int], ranges: Sequence[Sequence[float]]
) -> np.ndarray:
    """How many objects there are to find: int `(categories, areas)`."""
    counted = [row for row in truth if not row["iscrowd"]]
    area = np.array([row["area"] for row in counted], dtype=float)
    category_ids = np.array([row["category_id"] for row in counted], dtype=int)
    within = np.stack([(area >= low) & (area <= high) for low, high in ranges], axis=1)
    return np.stack([within[category_ids == category].sum(axis=0) for category in categories])


def _as_pycocotools(
    precision: np.ndarray,
    measured: np.ndarray,
    recalls: np.ndarray,
    between: np.ndarray,
    objects: np.ndarray,
) -> np.ndarray:
    """Precision at `recalls`, with pycocotools' value of one right detection out of one.

    Precision at a recall is the best at that recall or any higher. Up to the recall of one object,
    1 can thus be that of one out of one; it is that of two out of two, or of more, if and only if
    it still is 1 at a higher recall than that of one object.

    Args:
        precision: `(IoU thresholds, measured, categories, areas)`.
        measured: the recalls of `precision`, rising.
        recalls: those that are wanted, among them.
        between: of each category and area, one that takes two objects to reach, among them.
        objects: how many there are of each.
    """
    at_recalls = precision[:, np.searchsorted(measured, recalls)]
    probe = np.searchsorted(measured, between)[None, None]
    beyond = np.take_along_axis(precision, probe, axis=1)
    reached_by_one_object = recalls[:, None, None] <= 1 / np.maximum(objects, 1)
    single = reached_by_one_object & (at_recalls == 1) & (beyond != 1)
    return np.where(single, 1 / (1 + np.spacing(1)), at_recalls)

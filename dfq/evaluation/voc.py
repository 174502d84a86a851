"""Average precision by the rule of PASCAL VOC, 2010 and later (Everingham et al., IJCV 2015).

It differs from COCO's AP50 in four ways: precision is integrated over every recall that is reached,
not read at 101; a detection belongs to the object it overlaps most, and is wrong if another one has
that object already, even where it overlaps a second object enough; what lies on a difficult object
is told by the plain overlap; and all detections count, not 100 an image and category.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from ..data.readers import ImageSet
from ..models.base import Detections
from .coco_matching import as_annotations

Rows = list[dict]
"""Annotations in COCO's form."""


def voc_ap50(
    imageset: ImageSet, detections: Sequence[Detections], names: Sequence[str], iou: float = 0.5
) -> float:
    """Mean over the categories that occur of the area under the precision envelope (VOC 2010 and
    later; not the 11 points of VOC 2007), a fraction in [0, 1]; NaN where there is nothing to find.

    Args:
        imageset: a labelled set; objects that it ignores are VOC's difficult ones.
        detections: one an image, in pixels of the original images.
        names: what the detections' labels index.
        iou: the least overlap of a right detection with its object.

    Raises:
        UserError: the set is unlabelled, or shares no category with `names`.
    """
    categories, objects, detected = as_annotations(imageset, detections, names)
    precisions = [
        _average_precision(
            [row for row in objects if row["category_id"] == category],
            [row for row in detected if row["category_id"] == category],
            iou,
        )
        for category in categories
    ]
    defined = [value for value in precisions if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def _average_precision(objects: Rows, detected: Rows, iou: float) -> float:
    """Of one category; NaN without an object that is not difficult."""
    by_image: Mapping[int, Rows] = defaultdict(list)
    for row in objects:
        by_image[row["image_id"]].append(row)
    boxes = {image: _corners(rows) for image, rows in by_image.items()}
    matched: set[tuple[int, int]] = set()
    outcomes = []
    for row in sorted(detected, key=lambda row: -row["score"]):
        image = row["image_id"]
        if image in boxes:
            overlaps = box_iou(_corners([row]), boxes[image])[0]
            nearest = int(overlaps.argmax())
            if overlaps[nearest] >= iou:
                if by_image[image][nearest]["iscrowd"]:
                    continue
                outcomes.append((image, nearest) not in matched)
                matched.add((image, nearest))
                continue
        outcomes.append(False)
    total = sum(not row["iscrowd"] for row in objects)
    if total == 0:
        return math.nan
    right = np.cumsum(outcomes, dtype=float)
    recall = np.concatenate([[0.0], right / total])
    precision = right / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope))


def _corners(rows: Rows) -> Tensor:
    """x1 y1 x2 y2, float64 `(n, 4)`."""
    return box_convert(
        torch.tensor([row["bbox"] for row in rows], dtype=torch.float64), "xywh", "xyxy"
    )

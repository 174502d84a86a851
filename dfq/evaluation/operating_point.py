"""F1 of a detector at the score threshold that suits it best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.readers import ImageSet
from ..models.base import Detections
from .coco_matching import match


@dataclass(frozen=True)
class OperatingPoint:
    """How a detector does with one score threshold for all categories, fractions in [0, 1].

    Attributes:
        f1: harmonic mean of precision and recall, of all categories' detections together; NaN
            where there is nothing to find.
        precision: share of the detections that are right; NaN where nothing was detected.
        recall: share of the objects that are found; NaN as `f1`.
        threshold: the least score that counts; NaN where nothing was detected.
    """

    f1: float
    precision: float
    recall: float
    threshold: float


def best_f1(
    imageset: ImageSet, detections: Sequence[Detections], names: Sequence[str], iou: float = 0.5
) -> OperatingPoint:
    """The threshold with the highest F1, the highest one of equals, and what it gives.

    Detections are matched with objects as for AP, by COCO's rule; matching goes by falling score,
    so a threshold changes nothing above it. Those of categories without any object are wrong.

    Args:
        imageset: a labelled set.
        detections: one an image, in pixels of the original images.
        names: what the detections' labels index.
        iou: the least overlap of a right detection with its object, 0.5 to 0.95 in steps of 0.05.

    Raises:
        UserError: the set is unlabelled, or shares no category with `names`.
    """
    evaluator, _ = match(imageset, detections, names, areas=("all",))
    row = int(np.flatnonzero(np.isclose(evaluator.params.iouThrs, iou))[0])
    matchings = [matching for matching in evaluator.evalImgs if matching is not None]
    objects = sum(int((matching["gtIgnore"] == 0).sum()) for matching in matchings)
    if objects == 0:
        return OperatingPoint(math.nan, math.nan, math.nan, math.nan)
    counts = np.concatenate([matching["dtIgnore"][row] == 0 for matching in matchings])
    scores = np.concatenate([matching["dtScores"] for matching in matchings])[counts]
    right = np.concatenate([matching["dtMatches"][row] > 0 for matching in matchings])[counts]
    if len(scores) == 0:
        return OperatingPoint(0.0, math.nan, 0.0, math.nan)
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(right[order])
    # Detections of one score are taken or left together.
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    f1 = 2 * right[last] / (last + 1 + objects)
    best = int(np.argmax(f1))
    at = int(last[best])
    return OperatingPoint(
        float(f1[best]),
        float(right[at] / (at + 1)),
        float(right[at] / objects),
        float(scores[at]),
    )

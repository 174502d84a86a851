"""COCO average precision of a detector on a labelled image set.

Figures are those of pycocotools (Lin et al., "Microsoft COCO", 2014; the official evaluation code).
Only the categories that set and model share are measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.outlines import Segment
from ..data.readers import ImageSet, open_set
from ..errors import UserError
from ..models.base import Detecting, Detections
from ..models.coco_categories import distinct_names
from .bootstrap import bootstrap_ap
from .coco_accumulation import accumulate
from .coco_matching import require_labels
from .detection import Progress, detect_set

__all__ = ["Metrics", "bootstrap_ap", "evaluate", "predict", "score"]


@dataclass(frozen=True)
class Metrics:
    """What COCO's evaluation says, as fractions in [0, 1]; NaN where nothing was there to find.

    Attributes:
        AP: average precision, mean over IoU 0.50 to 0.95 and over categories.
        AP50, AP75: the same at one IoU.
        AP_small, AP_medium, AP_large: AP of objects below 32², up to 96², and above, in square
            pixels of the original image.
        AR100: average recall with at most 100 detections an image and category.
        images: number of images measured.
        image_size: pixels of the long side the network saw, where known.
        per_category: AP by the model's category name, of every category that is shared.
        missing_categories: the set's categories that the model does not have; not measured.
        seconds: wall time of reading and detecting (not of the matching), where known.
        images_per_second: the same, as a rate.
        AP_interval: between which values AP is in 95 % of all draws of as many images from this
            set (bootstrap); None where it was not asked for, or all draws are of one image.
        split: which of the set's splits was measured; None where it has none.
        dropped: boxes of the set that cannot be measured: without a positive size, not finite, or
            there twice.
        first_dropped: file and row of the first of these; None where there is none.
        dropped_boxes: both in a line; None where there are none.
        masks: the same figures for instance masks, on those `masks.images` images whose objects'
            outlines are all known; None where the detector or the set has no masks.
    """

    AP: float
    AP50: float
    AP75: float
    AP_small: float
    AP_medium: float
    AP_large: float
    AR100: float
    images: int
    image_size: int | None = None
    per_category: dict[str, float] = field(default_factory=dict)
    missing_categories: tuple[str, ...] = ()
    seconds: float | None = None
    images_per_second: float | None = None
    AP_interval: tuple[float, float] | None = None
    split: str | None = None
    dropped: int = 0
    first_dropped: str | None = None
    dropped_boxes: str | None = None
    masks: Metrics | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON can hold them: NaN becomes None, the tuple a list."""
        return {key: plain(value) for key, value in asdict(self).items()}


def evaluate(
    detector: Detecting,
    data: ImageSet | str | Path,
    *,
    image_size: int | None = None,
    batch_size: int = 16,
    score_threshold: float = 0.001,
    iou_threshold: float = 0.6,
    rect: bool = False,
    progress: Progress | None = None,
    limit: int | None = None,
    interval: bool = False,
) -> Metrics:
    """Measure a detector, float or quantized, on a labelled set.

    Args:
        detector: any family's, whose mode (train or eval) is restored afterwards; or an exported
            file.
        data: the set, or what `open_set` takes.
        image_size: pixels of the long side; the detector's own by default.
        batch_size, score_threshold, iou_threshold, rect, progress: see `predict`.
        limit: measure only the first so many images.
        interval: also find `AP_interval`.

    Raises:
        UserError: the set is broken or unlabelled, shares no category with the model, or
            `image_size` is none that the detector can take.
    """
    imageset = data if isinstance(data, ImageSet) else open_set(data)
    # Found before the minutes of detection, not after.
    require_labels(imageset)
    if limit is not None:
        imageset = imageset.head(limit)
    imageset.category_mapping(detector.names)
    size = detector.image_size if image_size is None else image_size
    start = time.perf_counter()
    outlined = imageset.segmented() if detector.has_masks else None
    rows = _predict(
        detector,
        imageset,
        image_size=size,
        batch_size=batch_size,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        rect=rect,
        masks=outlined is not None,
        progress=progress,
    )
    detections, segments = map(list, zip(*rows, strict=True))
    seconds = time.perf_counter() - start
    names = detector.names
    ap_interval = masks = None
    if interval and len(imageset) > 1:
        ap_interval = bootstrap_ap(imageset, detections, names)
    if outlined is not None:
        outlined_indices = [index for index, item in enumerate(imageset.items) if item.segmented]
        outlined_detections = [detections[index] for index in outlined_indices]
        shapes = [segments[index] for index in outlined_indices]
        masks = score(outlined, outlined_detections, names, shapes)
        if interval and len(outlined) > 1:
            of_masks = bootstrap_ap(outlined, outlined_detections, names, segments=shapes)
            masks = replace(masks, AP_interval=of_masks)
    return replace(
        score(imageset, detections, names),
        AP_interval=ap_interval,
        image_size=size,
        seconds=seconds,
        images_per_second=len(imageset) / seconds,
        masks=masks,
    )


def predict(
    detector: Detecting,
    imageset: ImageSet,
    *,
    image_size: int | None = None,
    batch_size: int = 16,
    score_threshold: float = 0.001,
    iou_threshold: float = 0.6,
    rect: bool = False,
    progress: Progress | None = None,
) -> list[Detections]:
    """Detections for every image of a set, in pixels of the original images, on the CPU; without
    masks.

    Args:
        detector: any family's, or an exported file.
        imageset: the images; labels are not needed.
        image_size: pixels of the long side; the detector's own by default.
        batch_size: images at a time.
        score_threshold: detections below are left out (AP wants this low).
        iou_threshold: overlap above which non-maximum suppression drops the weaker box.
        rect: pad a batch only to the next multiples of the stride instead of to a square. Faster,
            but AP then depends on how images are batched: figures to compare are of squares.
        progress: called after every batch.

    Raises:
        UserError: an image cannot be read, or `image_size` is none that the detector can take.
    """
    rows = _predict(
        detector,
        imageset,
        image_size=image_size,
        batch_size=batch_size,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        rect=rect,
        masks=False,
        progress=progress,
    )
    return [detections for detections, _ in rows]


def _predict(
    detector: Detecting,
    imageset: ImageSet,
    *,
    image_size: int | None,
    batch_size: int,
    score_threshold: float,
    iou_threshold: float,
    rect: bool,
    masks: bool,
    progress: Progress | None,
) -> list[tuple[Detections, list[Segment]]]:
    """What `predict` gives and, if wished, the masks of each image's first detections."""
    size = detector.image_size if image_size is None else image_size
    detector.check_size(size)
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}")
    return detect_set(
        detector,
        imageset,
        size,
        batch_size=batch_size,
        rect=rect,
        progress=progress,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        masks=masks,
    )


def score(
    imageset: ImageSet,
    detections: Sequence[Detections],
    names: Sequence[str],
    segments: Sequence[Sequence[Segment]] | None = None,
) -> Metrics:
    """COCO's metrics of given detections.

    Ignored objects (COCO crowds, VOC difficult) are matched as COCO's crowds: detections that lie
    in them count neither as right nor as wrong.

    Args:
        imageset: a labelled set.
        detections: one an image, in pixels of the original images.
        names: what the detections' labels index; categories that the set lacks are left out.
        segments: of each image, the masks of its first detections; those are measured then, and
            not the boxes, and every object of the set must have an outline.

    Raises:
        UserError: the set is unlabelled, or shares no category with `names`.
    """
    accumulated = accumulate(imageset, detections, names, segments)
    precision, recall, iou = accumulated.precision, accumulated.recall, accumulated.iou
    areas = {label: index for index, label in enumerate(accumulated.areas)}
    everywhere = precision[..., areas["all"]]
    mapping = imageset.category_mapping(names)
    named = distinct_names(names, accumulated.categories)
    return Metrics(
        AP=_mean(everywhere),
        AP50=_mean(everywhere[iou.index(0.5)]),
        AP75=_mean(everywhere[iou.index(0.75)]),
        AP_small=_mean(precision[..., areas["small"]]),
        AP_medium=_mean(precision[..., areas["medium"]]),
        AP_large=_mean(precision[..., areas["large"]]),
        AR100=_mean(recall[..., areas["all"]]),
        images=len(imageset),
        per_category={
            named[category]: _mean(everywhere[:, :, index])
            for index, category in enumerate(accumulated.categories)
        },
        missing_categories=tuple(
            name for name, index in zip(imageset.names, mapping, strict=True) if index is None
        ),
        split=imageset.split,
        dropped=imageset.dropped,
        first_dropped=imageset.first_dropped,
        dropped_boxes=imageset.remark(),
    )


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined: pycocotools writes -1 for a category without objects."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value

"""How far a file's detections moved from those of its float model, and at which score it finds as
many, without any label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from ..evaluation.agreement import matches
from ..models.base import Detections
from ..models.coco_categories import distinct_names
from .verify import Movement

THRESHOLD = 0.25
"""Score from which on a detection counts, as most people set it."""

SHRUNK = 0.8
"""Of the sides of large boxes, what has to be left."""

HALF, ENOUGH = 0.5, 8
"""Of the float model's detections, the share that any use of a file takes; and of how many."""

_SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}
"""COCO's, in square pixels of the original images."""

_WORST = 5
_FEWEST = 3
"""Detections of a category without which nothing is said of it."""


@dataclass(frozen=True)
class Group:
    """How many of some of the float model's detections the file finds, and where.

    Attributes:
        detections: how many the float model has.
        kept: those that the file has too, with any score: in the same category, IoU at least 0.5.
        box_iou: mean IoU over those kept; None where there are none.
        score_shift: mean of the file's score less the float model's, over those kept.
    """

    detections: int
    kept: int
    box_iou: float | None
    score_shift: float | None

    @property
    def share(self) -> float:
        """Of the detections, those kept; 1 where there are none."""
        return self.kept / self.detections if self.detections else 1.0


@dataclass(frozen=True)
class Moved(Movement):
    """`Group` of all detections of the float model with a score of 0.25 or more, by size, and of
    the categories that lost most.

    Attributes:
        all, sizes, worst: the groups; `sizes` by COCO's words.
        side_ratio: side of the file's box over the float model's, of the largest quarter of boxes,
            as a median over the boxes that overlap most; None where there are none to compare.
        images: of how many images.
        against: what the float model is.
        threshold: score from which on the file has as many detections as the float model from
            0.25 on; None where there is none.
    """

    all: Group
    sizes: dict[str, Group]
    worst: dict[str, Group]
    side_ratio: float | None
    images: int
    against: str
    threshold: float | None = None

    def as_before(self) -> bool:
        return (
            self.all.share >= 0.98
            and (self.all.box_iou or 0.0) >= 0.8
            and abs(self.all.score_shift or 0.0) <= 0.05
            and (self.side_ratio or 1.0) >= SHRUNK
        )

    def lost(self) -> str | None:
        if self.all.detections < ENOUGH or self.all.share >= HALF:
            return None
        return (
            f"detections: {self.all.kept} of the {self.against}'s {self.all.detections} are kept; "
            "the file is of another network, takes images in another way, or was quantized badly"
        )

    def clause(self) -> str | None:
        if not self.all.detections:
            return None
        return f"{self.all.share:.1%} of the {self.against}'s detections kept"

    def lines(self) -> list[str]:
        if not self.all.detections:
            return [f"moved: the {self.against} detects nothing above {THRESHOLD} on these images"]
        text = [
            f"moved: {self.all.kept} of {self.all.detections} detections of the {self.against} "
            f"kept on {self.images} images{_words(self.all)}"
        ]
        for name, group in [*self.sizes.items(), *self.worst.items()]:
            if group.detections and (group.share < 1 or name in self.sizes):
                text.append(f"  {name}: {group.kept} of {group.detections}{_words(group)}")
        if self.threshold is not None and abs(self.threshold - THRESHOLD) >= 0.005:
            text.append(
                f"threshold: use {self.threshold:g} instead of {THRESHOLD:g} for as many "
                "detections as the float model has"
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with shares."""

        def row(group: Group) -> dict[str, Any]:
            return {**asdict(group), "kept_share": group.share}

        return {
            **row(self.all),
            "sizes": {name: row(group) for name, group in self.sizes.items()},
            "worst_categories": {name: row(group) for name, group in self.worst.items()},
            "side_ratio": self.side_ratio,
            "images": self.images,
            "against": self.against,
            "threshold": {"float": THRESHOLD, "this": self.threshold},
        }


def moved(
    reference: Sequence[Detections],
    detections: Sequence[Detections],
    names: Sequence[str],
    against: str,
    above: float = THRESHOLD,
) -> Moved:
    """Compare detections, one an image, in pixels of the original images.

    Args:
        reference: the float model's.
        detections: the file's, with any score.
        names: of the categories.
        against: what the float model is, for the record.
        above: detections of the float model with a lower score do not count.
    """
    # Row of the float model's detections: area, label, IoU (NaN: lost), shift of the score.
    rows: list[tuple[float, int, float, float]] = []
    for expected, actual in zip(reference, detections, strict=True):
        matched = {row: (match, iou) for match, row, iou in matches(expected, actual, above)}
        areas = (expected.boxes[:, 2:] - expected.boxes[:, :2]).prod(dim=1)
        for row in (expected.scores > above).nonzero()[:, 0].tolist():
            iou = shift = math.nan
            if row in matched:
                match, iou = matched[row]
                shift = float(actual.scores[match] - expected.scores[row])
            rows.append((float(areas[row]), int(expected.labels[row]), iou, shift))
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    sizes = {
        name: _group(table[(table[:, 0] >= low) & (table[:, 0] < high)])
        for name, (low, high) in _SIZES.items()
    }
    named = distinct_names(names, np.unique(table[:, 1]).astype(int).tolist())
    groups = {name: _group(table[table[:, 1] == label]) for label, name in named.items()}
    worst = sorted(
        (item for item in groups.items() if item[1].detections >= _FEWEST),
        key=lambda item: (item[1].share, item[1].box_iou or 0.0),
    )
    ratio = _side_ratio(reference, detections, above)
    threshold = same_number(reference, detections)
    return Moved(
        _group(table), sizes, dict(worst[:_WORST]), ratio, len(reference), against, threshold
    )


def _words(group: Group) -> str:
    if group.box_iou is None:
        return ""
    return f", box IoU {group.box_iou:.3f}, scores {group.score_shift:+.3f}"


def _group(table: np.ndarray) -> Group:
    kept = table[~np.isnan(table[:, 2])]
    if not len(kept):
        return Group(len(table), 0, None, None)
    return Group(len(table), len(kept), float(kept[:, 2].mean()), float(kept[:, 3].mean()))


def _side_ratio(
    reference: Sequence[Detections], detections: Sequence[Detections], above: float
) -> float | None:
    """Sides of large boxes, the file's over the float model's; see `Moved.side_ratio`."""
    pairs = []
    for expected, actual in zip(reference, detections, strict=True):
        if not len(actual.boxes):
            continue
        overlaps = box_iou(expected.boxes, actual.boxes).nan_to_num(0.0)
        overlaps[expected.labels[:, None] != actual.labels] = 0.0
        for row in (expected.scores > above).nonzero()[:, 0].tolist():
            if overlaps[row].max() > 0:
                match = int(overlaps[row].argmax())
                sides = [b[2:] - b[:2] for b in (expected.boxes[row], actual.boxes[match])]
                pairs.append([float(torch.linalg.vector_norm(side)) for side in sides])
    if not pairs:
        return None
    table = np.array(pairs)
    largest = table[table[:, 0] >= np.quantile(table[:, 0], 0.75)]
    return float(np.median(largest[:, 1] / largest[:, 0]))


def same_number(
    reference: Sequence[Detections], detections: Sequence[Detections], at: float = THRESHOLD
) -> float | None:
    """A score from which on a file has as many detections as its float model has from `at` on: `at`
    itself where that is so, else the least. Suppression keeps whatever scores higher, so the number
    falls with it.

    Returns:
        As few digits as give that number, or the nearest there is; None where the float model has
        none, or the file cannot reach half as many.
    """
    wanted = sum(int((of_image.scores >= at).sum()) for of_image in reference)
    scores = np.sort(
        np.concatenate([of_image.scores.numpy() for of_image in detections]).astype(np.float64)
    )[::-1]
    scores = scores[np.isfinite(scores)]
    if not wanted or len(scores) < wanted / 2:
        return None
    as_many = int((scores >= at).sum())
    if as_many == wanted:
        return at
    if len(scores) <= wanted:
        return math.floor(float(scores[-1]) * 1e4) / 1e4
    # Scores on a grid come in heaps: cut at the one that ends nearest.
    ends = np.flatnonzero(np.diff(scores) < 0) + 1
    if not len(ends):
        return None
    cut = int(ends[np.abs(ends - wanted).argmin()])
    high, low = scores[cut - 1], scores[cut]
    for digits in range(2, 8):
        threshold = round((high + low) / 2, digits)
        if low < threshold <= high:
            return float(threshold)
    return float(high)

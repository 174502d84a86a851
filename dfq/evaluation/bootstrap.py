"""How much AP, or a difference of two, would move on another draw of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

from ..data.outlines import Segment
from ..data.readers import ImageSet
from ..models.base import Detections
from .coco_matching import match


def bootstrap_ap(
    imageset: ImageSet,
    detections: Sequence[Detections],
    names: Sequence[str],
    samples: int = 200,
    seed: int = 0,
    segments: Sequence[Sequence[Segment]] | None = None,
) -> tuple[float, float]:
    """95 % interval of AP over the choice of images (percentile bootstrap, Efron 1979).

    Each sample draws as many images as the set has, with replacement, and accumulates AP over
    them. Detections are matched once, because matching does not depend on the other images.

    Args:
        imageset, detections, names: as for `score`.
        samples: number of resampled sets.
        seed: of the draws.
        segments: as for `score`.

    Returns:
        The 2.5 and 97.5 percentiles of AP, fractions in [0, 1]; NaN where there is nothing to find.

    Raises:
        UserError: as `score`.
    """
    return _interval(_draws(imageset, detections, names, samples, seed, segments))


def bootstrap_difference(
    imageset: ImageSet,
    detections: Sequence[Detections],
    others: Sequence[Detections],
    names: Sequence[str],
    samples: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of the difference of two networks' AP on the same images (paired percentile
    bootstrap): both are measured on each draw, so that what makes a draw hard counts for both.

    Args:
        imageset, names, samples, seed: as for `bootstrap_ap`.
        detections, others: of the two networks.

    Returns:
        The 2.5 and 97.5 percentiles of AP minus the others' AP; NaN where there is nothing to find.

    Raises:
        UserError: as `score`.
    """
    first, second = (
        _draws(imageset, network_detections, names, samples, seed, None)
        for network_detections in (detections, others)
    )
    return _interval(first - second)


def _interval(values: np.ndarray) -> tuple[float, float]:
    if np.isnan(values).all():
        return math.nan, math.nan
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _draws(
    imageset: ImageSet,
    detections: Sequence[Detections],
    names: Sequence[str],
    samples: int,
    seed: int,
    segments: Sequence[Sequence[Segment]] | None,
) -> np.ndarray:
    """AP on each draw of images; equal seeds draw equal images."""
    evaluator, _ = match(imageset, detections, names, areas=("all",), segments=segments)
    tables = _tables(evaluator)
    generator = np.random.default_rng(seed)
    n = len(imageset)
    draws = [np.bincount(generator.integers(n, size=n), minlength=n) for _ in range(samples)]
    return np.array(
        [_average_precision(tables, counts, evaluator.params.recThrs) for counts in draws]
    )


@dataclass(frozen=True)
class _Table:
    """One category's detections of all images, best first, and what matching made of them.

    Attributes:
        image: int `(n,)`, position of the image in the set.
        right, wrong: bool `(IoU thresholds, n)`; neither where the detection is ignored.
        objects: int `(images,)`, how many objects there are to find in each image.
    """

    image: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    objects: np.ndarray


def _tables(evaluator: COCOeval) -> list[_Table]:
    """The matching of an evaluator with one area range, as tables; empty categories left out."""
    images = len(evaluator.params.imgIds)
    thresholds = len(evaluator.params.iouThrs)
    tables: list[_Table] = []
    for start in range(0, len(evaluator.evalImgs), images):
        evaluations = evaluator.evalImgs[start : start + images]
        objects = np.array(
            [
                0 if evaluation is None else int((evaluation["gtIgnore"] == 0).sum())
                for evaluation in evaluations
            ]
        )
        if not objects.any():
            continue
        present = [
            (position, evaluation)
            for position, evaluation in enumerate(evaluations)
            if evaluation is not None
        ]
        scores = np.concatenate([evaluation["dtScores"] for _, evaluation in present])
        image = np.concatenate(
            [[position] * len(evaluation["dtScores"]) for position, evaluation in present]
        )
        matched = np.concatenate(
            [evaluation["dtMatches"].reshape(thresholds, -1) for _, evaluation in present], 1
        )
        ignored = np.concatenate(
            [evaluation["dtIgnore"].reshape(thresholds, -1) for _, evaluation in present], 1
        )
        right = (matched > 0) & ~ignored.astype(bool)
        wrong = (matched == 0) & ~ignored.astype(bool)
        order = np.argsort(-scores, kind="stable")
        # Mistakes below the last right detection change neither recall nor the precision envelope.
        hits = np.flatnonzero(right[:, order].any(axis=0))
        order = order[: hits[-1] + 1 if len(hits) else 0]
        tables.append(_Table(image[order].astype(int), right[:, order], wrong[:, order], objects))
    return tables


def _average_precision(tables: list[_Table], counts: np.ndarray, recalls: np.ndarray) -> float:
    """COCO's AP of a set in which image i occurs `counts[i]` times; NaN without any object."""
    values: list[float] = []
    for table in tables:
        total = int(counts @ table.objects)
        if total == 0:
            continue
        weights = counts[table.image]
        right = np.cumsum(table.right * weights, axis=1)
        wrong = np.cumsum(table.wrong * weights, axis=1)
        recall = right / total
        precision = right / np.maximum(right + wrong, 1)
        # The interpolated precision at a recall: the best precision at that recall or any higher.
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        padded = np.pad(envelope, ((0, 0), (0, 1)))
        values.append(
            float(
                np.mean(
                    [
                        best[np.searchsorted(reached, recalls)]
                        for best, reached in zip(padded, recall, strict=True)
                    ]
                )
            )
        )
    return float(np.mean(values)) if values else math.nan

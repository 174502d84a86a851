"""How close the labels of a set are to those of a real one, image by image unseen.

A synthetic set stands in for the training data; these distances say how well its labels do, and
which part of them is off. Boxes are measured on the square canvas a detector sees: an image's long
side is 1, so sets of other resolutions and shapes compare.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from ..data.calibration_set import CalibrationSet
from ..data.image_set import ImageSet
from ..data.statistics import Objects
from ..errors import UserError
from ..models.coco_categories import match_names


@dataclass(frozen=True)
class Fidelity:
    """Distances of a set's labels from a reference's; 0 is equal, and none has a sign.

    Attributes:
        categories: Jensen-Shannon divergence of the categories, bits, in [0, 1].
        area: Wasserstein distance of the boxes' shares of the canvas, in [0, 1].
        aspect: Wasserstein distance of ln(width / height).
        count: Wasserstein distance of the objects an image.
    """

    categories: float
    area: float
    aspect: float
    count: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence in bits (Lin, 1991): the mean of the relative entropies of two
    distributions to their middle; 0 for equal ones, 1 for ones without overlap.

    Args:
        p, q: `(k,)`, not negative; counts or probabilities of the same k events.

    Raises:
        ValueError: where one of them is all zero.
    """
    if not p.sum() > 0 or not q.sum() > 0:
        raise ValueError("a distribution needs a positive sum")
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2

    def entropy_to_middle(distribution: np.ndarray) -> float:
        positive = distribution > 0
        ratio = distribution[positive] / middle[positive]
        return float((distribution[positive] * np.log2(ratio)).sum())

    # Rounding can leave a tiny negative sum.
    return min(1.0, max(0.0, (entropy_to_middle(p) + entropy_to_middle(q)) / 2))


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """1-Wasserstein distance of two samples on the line, in their unit: the area between their
    cumulative distributions.

    Args:
        a, b: `(n,)` and `(m,)`, any order, not empty.

    Raises:
        ValueError: where one is empty.
    """
    if not len(a) or not len(b):
        raise ValueError("a sample needs at least one value")
    a, b = np.sort(a), np.sort(b)
    at = np.sort(np.concatenate([a, b]))
    below_a = np.searchsorted(a, at[:-1], side="right") / len(a)
    below_b = np.searchsorted(b, at[:-1], side="right") / len(b)
    return float((np.abs(below_a - below_b) * np.diff(at)).sum())


def compare(
    data: CalibrationSet | ImageSet | Objects, reference: CalibrationSet | ImageSet | Objects
) -> Fidelity:
    """How far the labels of `data` are from those of `reference`.

    Categories are matched by name; one that only one of the sets has counts as a difference.

    Raises:
        UserError: where a set has no objects, or the two share no category name.
    """
    ours, theirs = _objects(data, "the set"), _objects(reference, "the reference")
    mapping = match_names(ours.names, theirs.names, "the set")
    extra = len(theirs.names)
    index = np.array([extra + i if m is None else m for i, m in enumerate(mapping)], np.int64)
    events = extra + len(ours.names)
    return Fidelity(
        categories=jensen_shannon(
            np.bincount(index[ours.categories], minlength=events),
            np.bincount(theirs.categories, minlength=events),
        ),
        area=wasserstein(_canvas_area(ours), _canvas_area(theirs)),
        aspect=wasserstein(_log_aspect(ours), _log_aspect(theirs)),
        count=wasserstein(ours.counts, theirs.counts),
    )


def _objects(data: CalibrationSet | ImageSet | Objects, name: str) -> Objects:
    objects = data if isinstance(data, Objects) else Objects.of(data)
    if not len(objects):
        raise UserError(f"{name} holds no objects to compare")
    return objects


def _canvas_area(objects: Objects) -> np.ndarray:
    """Share of the letterboxed square that each box covers, `(n,)`."""
    long_side = np.repeat(objects.sizes.max(axis=1), objects.counts)
    return np.asarray(objects.sides.prod(axis=1) / long_side**2)


def _log_aspect(objects: Objects) -> np.ndarray:
    # A box may have lost a side to rounding.
    sides = objects.sides[(objects.sides > 0).all(axis=1)]
    return np.asarray(np.log(sides[:, 0] / sides[:, 1]))

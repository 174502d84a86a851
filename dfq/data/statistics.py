"""What is in a set: its objects as plain arrays, and the figures that describe them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, shown
from ..runtime.ahead import read_all
from ..runtime.files import user_path
from .calibration_set import CalibrationSet
from .class_set import ClassSet, open_class_set
from .image_set import ImageSet, image_size
from .readers import open_set

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""At which distributions are described."""

SMALL, LARGE = 32**2, 96**2
"""COCO's bounds between small, medium and large objects, square pixels."""


AnySet = CalibrationSet | ImageSet | ClassSet
"""Whatever `dfq data show` describes."""


def open_any(source: str | Path) -> AnySet:
    """A calibration set, checked to be what it was made as, or any real set, class folders or
    folder of photos.

    Raises:
        UserError: there is neither, or it is broken.
    """
    path = user_path(source)
    if not path.exists():
        raise UserError(
            f"{shown(path)}: no such file or folder: no calibration set here, and no other set"
        )
    if CalibrationSet.is_one(path):
        return CalibrationSet.open(path).require_intact()
    if path.suffix.lower() == ".zip":
        return open_class_set(path)
    images = open_set(path)
    if not images.labelled and path.is_dir():
        # Photos that all lie in folders, of which there are several.
        with contextlib.suppress(UserError):
            classes = open_class_set(path)
            if len(classes.names) > 1:
                return classes
    return images


@dataclass(frozen=True)
class Objects:
    """The labels of any kind of set as flat arrays.

    Attributes:
        names: category names by index.
        sizes: int64 `(images, 2)`, width and height of each image, pixels.
        counts: int64 `(images,)`, objects an image; objects follow each other in its order.
        categories: int64 `(n,)`, indices into `names`.
        sides: float64 `(n, 2)`, width and height of each box, pixels.
        scores: float64 `(n,)` in [0, 1], the teacher's; None for a real set.
        labelled: false for photos without labels.
        split: which of the set's splits this is; None where it has none.
        dropped, first_dropped, remark: boxes that were left out: how many, file and row of the
            first, and both in a line; None for the latter two where there are none.
    """

    names: list[str]
    sizes: np.ndarray
    counts: np.ndarray
    categories: np.ndarray
    sides: np.ndarray
    scores: np.ndarray | None
    labelled: bool = True
    split: str | None = None
    dropped: int = 0
    first_dropped: str | None = None
    remark: str | None = None

    @classmethod
    def of(cls, data: AnySet) -> Objects:
        """Those of a set; crowd regions and difficult objects of a real one do not count.

        Raises:
            UserError: where there are no images, one is missing, or a category has no name.
        """
        if isinstance(data, ImageSet):
            return cls._of_real(data)
        if isinstance(data, ClassSet):
            return cls._of_classes(data)
        if not data.files:
            raise UserError(f"{data.root}: the set holds no images")
        sizes = np.array([image_size(data.root / name) for name in data.files], np.int64)
        rows = [label.double().numpy() for label in data.labels]
        boxes = np.concatenate(rows)
        counts = np.array([len(row) for row in rows], np.int64)
        categories = boxes[:, 0].astype(np.int64)
        wrong = categories[(categories < 0) | (categories >= len(data.names))]
        if len(wrong):
            raise UserError(
                f"{data.root / 'annotations.json'}: category {wrong[0] + 1} has no name; "
                "restore it or make the set again"
            )
        return cls(
            names=list(data.names),
            sizes=sizes,
            counts=counts,
            categories=categories,
            sides=boxes[:, 3:] * np.repeat(sizes, counts, axis=0),
            scores=np.concatenate([score.double().numpy() for score in data.scores]),
        )

    @classmethod
    def _of_classes(cls, data: ClassSet) -> Objects:
        """Of class folders: an object an image, which is all of it."""
        sizes = np.array(read_all(data.image_size, range(len(data))), np.int64)
        return cls(
            names=list(data.names),
            sizes=sizes,
            counts=np.ones(len(data), np.int64),
            categories=np.array([category for _, category in data.files], np.int64),
            sides=sizes.astype(np.float64),
            scores=None,
            remark=data.remark(),
        )

    @classmethod
    def _of_real(cls, data: ImageSet) -> Objects:
        boxes = [item.boxes[~item.ignore].astype(np.float64) for item in data.items]
        corners = np.concatenate(boxes)
        return cls(
            names=list(data.names),
            sizes=np.array([(item.width, item.height) for item in data.items], np.int64),
            counts=np.array([len(box) for box in boxes], np.int64),
            categories=np.concatenate([item.labels[~item.ignore] for item in data.items]),
            sides=corners[:, 2:] - corners[:, :2],
            scores=None,
            labelled=data.labelled,
            split=data.split,
            dropped=data.dropped,
            first_dropped=data.first_dropped,
            remark=data.remark(),
        )

    def __len__(self) -> int:
        return len(self.categories)

    @property
    def images(self) -> int:
        """How many images the set has."""
        return len(self.counts)

    def where(self, selected: np.ndarray) -> Objects:
        """Those of the images for which `selected`, bool `(images,)`, is true."""
        rows = np.repeat(selected, self.counts)
        return Objects(
            names=self.names,
            sizes=self.sizes[selected],
            counts=self.counts[selected],
            categories=self.categories[rows],
            sides=self.sides[rows],
            scores=None if self.scores is None else self.scores[rows],
        )


@dataclass(frozen=True)
class Summary:
    """What `dfq data show` says of a set.

    Attributes:
        images, objects: how many.
        sizes: (width, height, images of that size), the most frequent first.
        per_image: objects an image -> how many images have so many, ascending.
        categories: (name, objects), the most frequent first; only those that occur.
        side: square root of a box's area, pixels, at `QUANTILES`; None without objects.
        area: a box's share of its image, in [0, 1], at `QUANTILES`; None without objects.
        by_size: "small", "medium", "large" -> objects, by COCO's bounds.
        score: the teacher's score at `QUANTILES`; None without objects.
        mean_score: its mean; None without objects.
        labelled, split, dropped, first_dropped, remark: as in `Objects`.
        whole_images: whether every object is all of its image, as the labels of classifiers are.
    """

    images: int
    objects: int
    sizes: list[tuple[int, int, int]]
    per_image: dict[int, int]
    categories: list[tuple[str, int]]
    side: list[float] | None
    area: list[float] | None
    by_size: dict[str, int]
    score: list[float] | None
    mean_score: float | None
    labelled: bool = True
    split: str | None = None
    dropped: int = 0
    first_dropped: str | None = None
    remark: str | None = None
    whole_images: bool = False

    def top(self, count: int) -> tuple[list[tuple[str, int]], int, int]:
        """The `count` most frequent categories, how many others occur, and their objects."""
        rest = self.categories[count:]
        return self.categories[:count], len(rest), sum(objects for _, objects in rest)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; quantiles as a mapping from "0.05" and so on."""

        def by_quantile(values: Sequence[float] | None) -> dict[str, float] | None:
            return None if values is None else dict(zip(map(str, QUANTILES), values, strict=True))

        return {
            "images": self.images,
            "labelled": self.labelled,
            "split": self.split,
            "dropped": self.dropped,
            "first_dropped": self.first_dropped,
            "objects": self.objects,
            "image_sizes": [
                {"width": width, "height": height, "images": images}
                for width, height, images in self.sizes
            ],
            "objects_per_image": {str(count): images for count, images in self.per_image.items()},
            "categories": [{"name": name, "objects": objects} for name, objects in self.categories],
            "box_side_pixels": by_quantile(self.side),
            "box_area_share": by_quantile(self.area),
            "by_size": self.by_size,
            "score": by_quantile(self.score),
            "mean_score": self.mean_score,
        }


def summarize(objects: Objects) -> Summary:
    """The figures of a set's objects."""
    pixels = objects.sides.prod(axis=1)
    images = objects.sizes.prod(axis=1)
    share = pixels / np.repeat(images, objects.counts)
    small, large = int((pixels < SMALL).sum()), int((pixels > LARGE).sum())
    sizes, size_counts = np.unique(objects.sizes, axis=0, return_counts=True)
    by_frequency = sorted(
        zip(sizes.tolist(), size_counts.tolist(), strict=True), key=lambda row: -row[1]
    )
    occurring = np.bincount(objects.categories, minlength=len(objects.names))
    categories = [(objects.names[i], int(n)) for i, n in enumerate(occurring) if n]
    values, frequencies = np.unique(objects.counts, return_counts=True)
    scores = objects.scores
    return Summary(
        images=objects.images,
        objects=len(objects),
        sizes=[(width, height, count) for (width, height), count in by_frequency],
        per_image=dict(zip(values.tolist(), frequencies.tolist(), strict=True)),
        categories=sorted(categories, key=lambda row: -row[1]),
        side=_quantiles(np.sqrt(pixels)),
        area=_quantiles(share),
        by_size={"small": small, "medium": len(objects) - small - large, "large": large},
        score=None if scores is None else _quantiles(scores),
        mean_score=float(scores.mean()) if scores is not None and len(scores) else None,
        labelled=objects.labelled,
        split=objects.split,
        dropped=objects.dropped,
        first_dropped=objects.first_dropped,
        remark=objects.remark,
        whole_images=len(objects) > 0
        and bool((objects.counts <= 1).all())
        and bool((share > 0.999).all()),
    )


def _quantiles(values: np.ndarray) -> list[float] | None:
    return [float(v) for v in np.quantile(values, QUANTILES)] if len(values) else None

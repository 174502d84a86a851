"""Labels for synthetic images: where they start.

Labels of one image are float32 `(n, 5)`: category, cx, cy, w, h, normalised to [0, 1].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor
from torchvision.ops import box_iou

from ..data.image_set import ImageSet, Item
from ..data.readers import open_set
from ..errors import UserError
from ..models.base import Detections, Model
from ..models.classifying import Classifier, whole_image
from ..runtime.label_sets import label_set
from .settings import Synthesis

Start = Callable[[Generator, int, int], list[Tensor]]

LARGEST_SIDE = 0.9
"""Of a scattered label, in sides of the image."""
PLACING_ATTEMPTS = 20
PLACING_OVERLAP = 0.1
"""Largest IoU that scattered labels of one image begin with."""


MOST_OBJECTS = 25
"""In an image of the *multi-sample* baseline, as the paper's public code has it."""


def _placed(generator: Generator, sides: Tensor) -> Tensor:
    """Boxes (cx, cy, w, h) of sides `(n, 2)`, centres uniform where they lie in the image."""
    centres = torch.rand(len(sides), 2, generator=generator) * (1 - sides) + sides / 2
    return torch.cat([centres, sides], dim=1)


def _boxes(generator: Generator, count: int) -> Tensor:
    """`count` boxes (cx, cy, w, h) inside the image, sides uniform in [0.2, 0.8] (the paper's)."""
    return _placed(generator, torch.rand(count, 2, generator=generator) * (0.8 - 0.2) + 0.2)


def _in_cells(boxes: Tensor, side: int) -> Tensor:
    """Of `side` x `side` boxes in an image each, those in the cells of a grid over one image."""
    corner = torch.arange(side).float()
    corners = torch.cartesian_prod(corner, corner)
    return torch.cat([corners + boxes[:, :2], boxes[:, 2:]], dim=1) / side


def _categories(generator: Generator, count: int, classes: int) -> Tensor:
    return torch.randint(classes, (count, 1), generator=generator).float()


def single(generator: Generator, images: int, classes: int) -> list[Tensor]:
    """One object an image, `(1, 5)` each: category uniform, sides uniform in [0.2, 0.8] (the
    paper's start)."""
    rows = torch.cat([_categories(generator, images, classes), _boxes(generator, images)], dim=1)
    return list(rows.split(1))


def multi(generator: Generator, images: int, classes: int) -> list[Tensor]:
    """One to `MOST_OBJECTS` random objects an image, `(n_i, 5)` each, all numbers equally likely;
    overlaps are not avoided (the *multi-sample* baseline)."""
    counts = torch.randint(1, MOST_OBJECTS + 1, (images,), generator=generator).tolist()
    return [
        torch.cat([_categories(generator, n, classes), _boxes(generator, n)], dim=1) for n in counts
    ]


def scattered(
    generator: Generator, images: int, classes: int, *, most: int, smallest_area: float
) -> list[Tensor]:
    """One to `most` objects an image that hardly overlap, `(n_i, 5)` each: few more often than
    many, small ones as often as large ones.

    Counts, sides and aspect ratios (1/4 to 4) are uniform on logarithmic scales, so no scale is
    preferred and no statistics of real data are used. Large objects are placed first; one without
    room after `PLACING_ATTEMPTS` is left out.

    Args:
        generator: draws them.
        images: how many.
        classes: categories to draw from.
        most: objects an image.
        smallest_area: share of the image that the smallest ones cover; the largest have sides of
            `LARGEST_SIDE`.
    """
    draw = torch.rand(images, generator=generator)
    counts = ((most + 1) ** draw).floor().clamp(1, most).long().tolist()
    low, high = math.log(math.sqrt(smallest_area)), math.log(LARGEST_SIDE)
    result = []
    for n in counts:
        side = torch.exp(low + (high - low) * torch.rand(n, 1, generator=generator))
        tilt = (torch.rand(n, 1, generator=generator) - 0.5) * math.log(4)
        sides = torch.cat([side * tilt.exp(), side / tilt.exp()], dim=1).clamp_max(LARGEST_SIDE)
        placed = torch.zeros(0, 4)
        for row in sides[sides.prod(dim=1).argsort(descending=True)]:
            # All attempts at once; the first that is free counts.
            centres = torch.rand(PLACING_ATTEMPTS, 2, generator=generator) * (1 - row) + row / 2
            boxes = torch.cat([centres, row.expand_as(centres)], dim=1)
            if len(placed):
                overlap = box_iou(to_corners(boxes), to_corners(placed)).amax(dim=1)
                boxes = boxes[overlap <= PLACING_OVERLAP]
            placed = torch.cat([placed, boxes[:1]])
        result.append(torch.cat([_categories(generator, len(placed), classes), placed], dim=1))
    return result


def tile(generator: Generator, images: int, classes: int) -> list[Tensor]:
    """One random object in each cell of a grid of 2 x 2 or 3 x 3, `(4, 5)` or `(9, 5)` an image,
    categories uniform (the *tile* baseline). Sides and place relative to the cell are drawn as
    `single` draws them relative to the image."""
    result = []
    for side in _grids(generator, images):
        categories = _categories(generator, side * side, classes)
        boxes = _in_cells(_boxes(generator, side * side), side)
        result.append(torch.cat([categories, boxes], dim=1))
    return result


def _grids(generator: Generator, images: int) -> list[int]:
    """Cells in a row of each image's grid."""
    return torch.randint(2, 4, (images,), generator=generator).tolist()


def none(generator: Generator, images: int, classes: int) -> list[Tensor]:
    """No labels, `(0, 5)` an image: task-agnostic synthesis."""
    return [torch.zeros(0, 5) for _ in range(images)]


def whole(generator: Generator, images: int, classes: int) -> list[Tensor]:
    """One category an image, uniform, of the whole image: what a classifier is asked for."""
    categories = torch.randint(classes, (images,), generator=generator)
    return list(whole_image(categories).split(1))


CLASS = "class"
"""Labels of images as a whole, which are a classifier's."""

STARTS: dict[str, Start] = {
    "adaptive": single,
    "single": single,
    "multi": multi,
    "tile": tile,
    "none": none,
}


class RealLabels:
    """Labels taken from the images of a real set, as a detector sees them: letterboxed.

    Images without an object that the detector has a category for are left out, as are crowd
    regions and difficult objects. A batch takes each image once before it takes one twice.

    Args:
        images: a labelled set.
        names: the detector's categories; the set's are matched with them by name.

    Raises:
        UserError: where the set has no object of the detector's categories.
    """

    def __init__(self, images: ImageSet, names: Sequence[str]) -> None:
        mapping = images.category_mapping(names)
        every = (_letterboxed(item, mapping) for item in images.items)
        self.labels = [label for label in every if len(label)]
        if not self.labels:
            raise UserError(
                f"{images.source}: has no object of the model's categories to take labels from"
            )

    def __call__(self, generator: Generator, images: int, classes: int) -> list[Tensor]:
        """Labels of so many images, `(n_i, 5)` each."""
        rounds = -(-images // len(self.labels))
        orders = [torch.randperm(len(self.labels), generator=generator) for _ in range(rounds)]
        return [self.labels[i].clone() for i in torch.cat(orders)[:images].tolist()]


class DrawnLike:
    """Random objects that are as frequent and as large as those of a real set: the *multi-sample*
    and *tile* baselines in distribution.

    Category and size of an object are those of one drawn from the set, its place is random. An
    image has as many objects as one drawn from the set, or one in each cell of a grid; what is
    larger than a cell is shrunk to fit.

    Args:
        labels: per image `(n, 5)`, none of them empty.
        tiled: one object in each cell.
    """

    def __init__(self, labels: Sequence[Tensor], *, tiled: bool) -> None:
        self.counts = [len(label) for label in labels]
        self.objects = torch.cat(list(labels))[:, [0, 3, 4]]
        self.tiled = tiled

    def __call__(self, generator: Generator, images: int, classes: int) -> list[Tensor]:
        """Labels of so many images, `(n_i, 5)` each."""
        if self.tiled:
            sides = _grids(generator, images)
            counts = [side * side for side in sides]
        else:
            sides = [1] * images
            drawn = torch.randint(len(self.counts), (images,), generator=generator)
            counts = [self.counts[i] for i in drawn.tolist()]
        result = []
        for side, count in zip(sides, counts, strict=True):
            indices = torch.randint(len(self.objects), (count,), generator=generator)
            categories, sizes = self.objects[indices].split([1, 2], dim=1)
            sizes = sizes * side
            boxes = _placed(generator, sizes / sizes.amax(dim=1, keepdim=True).clamp_min(1))
            boxes = _in_cells(boxes, side) if self.tiled else boxes
            result.append(torch.cat([categories, boxes], dim=1))
        return result


def _letterboxed(item: Item, mapping: Sequence[int | None]) -> Tensor:
    """Labels `(n, 5)` of one image on the square canvas whose side is the image's long one."""
    sides = np.array([item.width, item.height], np.float64)
    canvas = sides.max()
    corners = item.boxes.astype(np.float64).reshape(-1, 2, 2)
    # Annotations reach past the image's edge now and then.
    corners = (corners.clip(0, sides) + (canvas - sides) / 2) / canvas
    extent = corners[:, 1] - corners[:, 0]
    usable = ~item.ignore & (extent > 0).all(axis=1)
    rows = [
        [float(category), *corners[i].mean(axis=0), *extent[i]]
        for i, label in enumerate(item.labels)
        if usable[i] and (category := mapping[int(label)]) is not None
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)


def _open_source(labels: str) -> ImageSet | None:
    """The set that `real:SET` and the like name; None for the built-in starts."""
    kind_and_source = label_set(labels)
    if kind_and_source is None:
        return None
    try:
        images = open_set(kind_and_source[1])
    except UserError as error:
        raise UserError(f"synthesis.labels: {error}") from None
    if not images.labelled:
        raise UserError(f"synthesis.labels: {images.source}: the set has no labels")
    images.require_boxes()
    return images


def label_start(settings: Synthesis, names: Sequence[str]) -> Start:
    """Where the labels of a set come from.

    Args:
        settings: `labels` is a key of `STARTS`, or names a real set; `label_stage` says how
            adaptive ones begin.
        names: the detector's categories.

    Raises:
        UserError: where the real set cannot be opened, or has no labels for this detector.
    """
    images = _open_source(settings.labels)
    if images is not None:
        real = RealLabels(images, names)
        kind = settings.labels.partition(":")[0]
        return real if kind == "real" else DrawnLike(real.labels, tiled=kind == "tile")
    stage = settings.label_stage
    if settings.labels == "adaptive" and stage.sampler == "scattered":
        return partial(scattered, most=stage.objects, smallest_area=stage.smallest_area)
    return whole if settings.labels == CLASS else STARTS[settings.labels]


def applied(model: Model, settings: Synthesis) -> Synthesis:
    """The settings as they apply to a model: images for a classifier have one category each, if
    they have any, however objects would be placed.

    Raises:
        UserError: labels are to come from a real set, and the model is a classifier.
    """
    if not isinstance(model, Classifier) or settings.labels in ("none", CLASS):
        return settings
    if label_set(settings.labels) is not None:
        raise UserError(
            f"synthesis.labels: {settings.labels}: boxes are for detectors; leave it out, and the "
            "categories are drawn evenly"
        )
    return settings.model_copy(update={"labels": CLASS})


def label_source_identity(settings: Synthesis) -> str | None:
    """The sha256 of all that a real set adds to what determines a synthetic one, hexadecimal: its
    categories and, in order, every image's size and boxes; not where it lies, nor its pixels. None
    for labels that come from no set.

    Raises:
        UserError: where the set cannot be opened or has no labels.
    """
    images = _open_source(settings.labels)
    if images is None:
        return None
    digest = hashlib.sha256(repr(list(images.names)).encode())
    for item in images.items:
        digest.update(repr((item.width, item.height, len(item.boxes))).encode())
        for values, kind in ((item.boxes, "<f4"), (item.labels, "<i8"), (item.ignore, "<u1")):
            digest.update(np.ascontiguousarray(values, dtype=kind).tobytes())
    return digest.hexdigest()


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x1, y1, x2, y2)."""
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)


def teacher_scores(
    labels: Sequence[Tensor], detections: Sequence[Detections], size: int, *, iou: float = 0.5
) -> list[Tensor]:
    """How sure the teacher is of each label: the best score among its detections of the same
    category that overlap the label by `iou`; 0 where there is none. `(n,)` per image."""
    result = []
    for label, detected in zip(labels, detections, strict=True):
        if not len(label) or not len(detected):
            result.append(torch.zeros(len(label)))
            continue
        overlap = box_iou(to_corners(label[:, 1:]), detected.boxes.float().cpu() / size)
        same = label[:, :1].long() == detected.labels.cpu()[None]
        score = torch.where((overlap >= iou) & same, detected.scores.float().cpu()[None], 0.0)
        result.append(score.amax(dim=1))
    return result

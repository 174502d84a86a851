"""How often a classifier is right on labelled images, and how often it says what another says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.class_set import ClassSet
from ..data.cropped_images import CroppedImages
from ..errors import UserError, shown
from ..models.classifying import Classifying
from ..models.coco_categories import distinct_names
from ..runtime.progress import Progress

BATCH_SIZE = 64
SAMPLES = 1000
"""Draws of as many images, for an interval."""

Report = Callable[[int, int], object]
"""Called with the number of images done and the number of images there are."""


@dataclass(frozen=True)
class ClassificationMetrics:
    """What a classifier is right about, as fractions in [0, 1].

    Attributes:
        top1: share of the images whose likeliest category is theirs.
        top5: share of those whose category is among the five likeliest.
        f1_micro: F1 of all images together, which is `top1` where each has one category.
        f1_macro: mean over the categories of the set of each one's F1, the harmonic mean of
            precision and recall.
        images: number of images measured.
        image_size: pixels of the side that the network saw.
        per_category: share of a category's images that are right, by the model's name of it.
        missing_categories: the set's categories that the model does not have; not measured.
        by_position: whether categories were matched by position, as no name is shared.
        passed_over: files of the set that are no images.
        seconds: wall time of reading and classifying.
        images_per_second: the same, as a rate.
        top1_interval: between which values `top1` is in 95 % of all draws of as many images from
            this set (bootstrap); None where it was not asked for.
    """

    top1: float
    top5: float
    f1_micro: float
    f1_macro: float
    images: int
    image_size: int
    per_category: dict[str, float] = field(default_factory=dict)
    missing_categories: tuple[str, ...] = ()
    by_position: bool = False
    passed_over: int = 0
    seconds: float | None = None
    images_per_second: float | None = None
    top1_interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON can hold them."""
        interval = self.top1_interval
        return {
            **asdict(self),
            "missing_categories": list(self.missing_categories),
            "top1_interval": None if interval is None else list(interval),
        }


@dataclass(frozen=True)
class Agreed:
    """How often a network says what the float one says, on images whose labels do not count.

    Attributes:
        images: of how many.
        same: those for which both find the same category likeliest.
        divergence: mean over the images of KL(float || other) of their probabilities, in nats.
    """

    images: int
    same: int
    divergence: float

    @property
    def share(self) -> float:
        """Of the images, in [0, 1]."""
        return self.same / self.images

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the share."""
        return {**asdict(self), "share": self.share}

    def sentence(self, where: str) -> str:
        """What was found, for people; `where` are the images."""
        return (
            f"on {where} it finds the same category likeliest as the float network in "
            f"{self.same} of {self.images} ({self.share:.1%}); divergence of the probabilities "
            f"{self.divergence:.4g} an image"
        )


def evaluate_classifier(
    model: Classifying,
    data: ClassSet,
    *,
    image_size: int | None = None,
    interval: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: Report | None = None,
) -> ClassificationMetrics:
    """Measure a classifier on the images of a set whose categories it has.

    Args:
        model: in eval mode, or a file.
        data: labelled.
        image_size: side in pixels; None: the model's own.
        interval: also find `top1_interval`.
        batch_size: images at a time.
        progress: told how far it is.

    Raises:
        UserError: the set shares no category with the model, an image cannot be read, or the size
            is none that the model can take.
    """
    size = image_size or model.image_size
    model.check_size(size)
    images = CroppedImages(data, model, size)
    measured, targets = images.labelled()
    began = time.monotonic()
    best, done = [], 0
    with images.batches(measured, batch_size) as batches:
        for batch in batches:
            best.append(top(logits_of(model, batch)))
            done += len(batch)
            if progress is not None:
                progress(done, len(measured))
    seconds = time.monotonic() - began
    names = distinct_names(model.names, range(len(model.names)))
    figures, per_category = figures_of(torch.cat(best), targets)
    top1 = figures["top1"]
    return ClassificationMetrics(
        **figures,
        images=len(measured),
        image_size=size,
        per_category={names[category]: share for category, share in per_category.items()},
        missing_categories=tuple(
            name for name, index in zip(data.names, images.mapping, strict=True) if index is None
        ),
        by_position=images.by_position,
        passed_over=data.passed_over,
        seconds=seconds,
        images_per_second=len(measured) / seconds if seconds > 0 else None,
        top1_interval=_interval(top1, len(measured)) if interval else None,
    )


def figures_of(ranked: Tensor, targets: Tensor) -> tuple[dict[str, float], dict[int, float]]:
    """`top1`, `top5`, `f1_micro` and `f1_macro` of `ClassificationMetrics`; and by category the
    share of its images that are right.

    Args:
        ranked: the likeliest categories, int64 `(n, 5)`; see `top`.
        targets: the right ones, int64 `(n,)`.
    """
    per_category, f1 = _by_category(targets, ranked[:, 0])
    figures = {
        "top1": int((ranked[:, 0] == targets).sum()) / len(targets),
        "top5": int((ranked == targets[:, None]).any(dim=1).sum()) / len(targets),
        "f1_micro": _micro(targets, ranked[:, 0]),
        "f1_macro": float(np.mean(f1)),
    }
    return figures, per_category


def paired_interval(right: Tensor, reference_right: Tensor) -> tuple[float, float]:
    """Between which values the difference of two networks' top-1 is in 95 % of all draws of as many
    images (bootstrap).

    Args:
        right, reference_right: bool `(n,)`, whether each of them is right about an image.
    """
    difference = right.numpy().astype(np.int64) - reference_right.numpy().astype(np.int64)
    # Of each draw it counts how many images are of each of the three values.
    shares = [float((difference == value).mean()) for value in (-1, 0, 1)]
    drawn = np.random.default_rng(0).multinomial(len(difference), shares, SAMPLES)
    low, high = np.percentile((drawn[:, 2] - drawn[:, 0]) / len(difference), [2.5, 97.5])
    return float(low), float(high)


def _micro(targets: Tensor, predicted: Tensor) -> float:
    """F1 of the counts of all categories together."""
    true = int((targets == predicted).sum())
    wrong = len(targets) - true
    # What is wrong was given for one category and missed for another.
    return 2 * true / (2 * true + 2 * wrong)


def _by_category(targets: Tensor, predicted: Tensor) -> tuple[dict[int, float], list[float]]:
    """Recall and F1 of each category that occurs."""
    recall, f1 = {}, []
    for category in targets.unique().tolist():
        is_target, is_predicted = targets == category, predicted == category
        true = int((is_target & is_predicted).sum())
        recall[category] = true / int(is_target.sum())
        f1.append(2 * true / (int(is_target.sum()) + int(is_predicted.sum())))
    return recall, f1


def _interval(share: float, images: int) -> tuple[float, float]:
    """Percentiles of the share in draws of so many images, with replacement."""
    drawn = np.random.default_rng(0).binomial(images, share, SAMPLES) / images
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def logits_of(model: Classifying, batch: Tensor) -> Tensor:
    """Logits, float32 `(n, classes)` on the CPU, of uint8 images `(n, 3, h, w)`."""
    return model.classify(batch.float() / 255)


def top(logits: Tensor, count: int = 5) -> Tensor:
    """The likeliest categories, int64 `(n, count)` or as many as there are, the likeliest first."""
    return logits.topk(min(count, logits.shape[1]), dim=1).indices


def divergences(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || other) of two networks' probabilities by image, nats: `(n,)`.

    Args:
        logits, reference: `(n, classes)`.
    """
    ours, theirs = (F.log_softmax(rows.double(), dim=1) for rows in (logits, reference))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)


def agreed_on_pixels(model: Classifying, reference: Classifying, pixels: Tensor) -> Agreed:
    """How often two networks agree on images as they take them, uint8 `(n, 3, h, w)`."""
    return _agreed(model, reference, pixels.split(BATCH_SIZE), len(pixels), None)


def class_agreement(
    model: Classifying,
    reference: Classifying,
    images: ClassSet,
    *,
    progress: Progress,
    image_size: int | None = None,
) -> Agreed:
    """How often a network says what the float one says on real images; their labels do not count.

    Args:
        model, reference: of the same categories.
        images: labelled or not.
        progress: told how far it is.
        image_size: side in pixels; None: the model's own.

    Raises:
        UserError: an image cannot be read, or the size is none that both can take.
    """
    size = image_size or model.image_size
    for classifier in (reference, model):
        classifier.check_size(size)
    bare = ClassSet(images.source, [], [(name, -1) for name, _ in images.files], images.packed)
    reading = CroppedImages(bare, model, size).batches(range(len(bare)), BATCH_SIZE)
    with progress.task("agreement", len(bare), "images") as task, reading as batches:
        return _agreed(model, reference, batches, len(bare), task.update)


def _agreed(
    model: Classifying,
    reference: Classifying,
    batches: Any,
    count: int,
    progress: Report | None,
) -> Agreed:
    same, done, divergence = 0, 0, 0.0
    for batch in batches:
        ours, theirs = logits_of(model, batch), logits_of(reference, batch)
        same += int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
        divergence += float(divergences(ours, theirs).sum())
        done += len(batch)
        if progress is not None:
            progress(done, count)
    mean = divergence / count
    if not math.isfinite(mean):
        raise UserError(f"{shown(model.source)}: gives no finite predictions")
    # Rounded: the last bits are those of the order in which sums are taken.
    return Agreed(count, same, round(mean, 6))

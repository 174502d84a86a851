"""How much of what the float network detects a low-bit one still detects, without any label.

The float network's own detections with a score above 0.3 are taken for the objects of a set of
images, and the low-bit network is measured against them as against labels: the float network itself
has an average precision of 1. It needs no labels, so it can be asked of any network and any images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from ..data.image_set import ImageSet, Item, usable
from ..errors import UserError, argument, shown
from ..models.base import Detecting, Detections, Detector, Predicting
from ..runtime.progress import Progress
from .coco import bootstrap_ap, plain, predict, score

REFERENCE_SCORE = 0.3
"""Detections of the float network that are not above it are no objects."""

BATCH_SIZE = 16
"""Images at a time, where nobody says."""

SAME_BOX = 0.5
"""Boxes of one category that overlap by so much (intersection over union) are of one object."""


@dataclass(frozen=True)
class Kept:
    """What is left of a network's detections.

    Attributes:
        objects: detections of the float network with a score above `REFERENCE_SCORE`.
        kept: those of them that the other network detects too, with any score: in the same
            category, with an IoU of at least `SAME_BOX`. Each counts once.
        kept_above: those that it detects with a score above `REFERENCE_SCORE`.
        score_shift: mean of its score less the float network's over those kept, in [-1, 1]; None
            where there are none.
        images: of how many images.
    """

    objects: int
    kept: int
    kept_above: int
    score_shift: float | None
    images: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self, where: str) -> str:
        """What was found, for people; `where` are the images."""
        return sentence(self, where)


@dataclass(frozen=True)
class Agreement(Kept):
    """`Kept`, and average precision against the float network's detections as labels.

    Attributes:
        AP: mean over IoU 0.50 to 0.95 and over the categories that the float network detects, a
            fraction in [0, 1]; NaN where it detects nothing.
        AP50: the same at an IoU of 0.5.
        image_size: pixels of the long side both networks saw.
        AP_interval: between which values AP is in 95 % of all draws of as many images; None where
            it was not asked for, or all draws are of one image.
    """

    AP: float
    AP50: float
    image_size: int
    AP_interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON can hold them: NaN becomes None, the tuple a list."""
        return {key: plain(value) for key, value in asdict(self).items()}


def kept_of(
    reference: Sequence[Detections],
    detections: Sequence[Detections],
    above: float = REFERENCE_SCORE,
) -> Kept:
    """What of a float network's detections another network has.

    As in COCO's evaluation, detections are taken by falling score, and each is matched with the
    object of its category that it overlaps most and that none before it was matched with.

    Args:
        reference: the float network's, one an image, on the CPU.
        detections: the other network's on the same images.
        above: detections of the float network whose score is not above it are no objects.
    """
    objects, shifts, again = 0, [], 0
    for reference_detections, image_detections in zip(reference, detections, strict=True):
        rows = _certain(reference_detections, above)
        objects += int(rows.sum())
        for row, match, _ in matches(reference_detections, image_detections, above):
            shifts.append(
                float(image_detections.scores[row]) - float(reference_detections.scores[match])
            )
            again += bool(image_detections.scores[row] > above)
    # Rounded: the last bits are those of the order in which sums are taken.
    shift = round(float(np.mean(shifts)), 6) if shifts else None
    return Kept(objects, len(shifts), again, shift, len(reference))


def matches(
    reference: Detections, detections: Detections, above: float
) -> list[tuple[int, int, float]]:
    """Which detections of two networks in one image are of one object, as `kept_of` has it.

    Returns:
        Row in `detections`, row in `reference`, and IoU.
    """
    rows = _certain(reference, above).nonzero()[:, 0]
    boxes, labels = reference.boxes[rows], reference.labels[rows]
    # A network that has diverged gives NaN, which overlaps nothing.
    overlaps = box_iou(detections.boxes, boxes).nan_to_num(0.0)
    overlaps[detections.labels[:, None] != labels] = 0.0
    overlaps[~detections.scores.isfinite()] = 0.0
    pairs = []
    for row in detections.scores.argsort(descending=True, stable=True).tolist():
        if not len(boxes) or overlaps[row].max() < SAME_BOX:
            continue
        match = int(overlaps[row].argmax())
        pairs.append((row, int(rows[match]), float(overlaps[row, match])))
        overlaps[:, match] = 0.0
    return pairs


def sentence(counts: Kept, where: str) -> str:
    """What was found, for people.

    Args:
        counts: the figures.
        where: the images, as in "12 held-out synthetic images".
    """
    if not counts.objects:
        return (
            f"the float network detects nothing with a score above {REFERENCE_SCORE} on {where}: "
            "how close the low-bit one is cannot be said from them"
        )
    text = (
        f"of the float network's {counts.objects} detections with a score above {REFERENCE_SCORE} "
        f"on {where}, {counts.kept} are kept (same category, IoU at least {SAME_BOX}), "
        f"{counts.kept_above} of them with a score above {REFERENCE_SCORE} again"
    )
    if counts.score_shift is None:
        return text
    return f"{text}; scores shifted by {counts.score_shift:+.3f} on average"


def check_categories(model: Predicting, reference: Predicting, name: str = "against") -> None:
    """Refuse two networks that do not have the same categories.

    Args:
        model, reference: the networks.
        name: of the argument that named the second.

    Raises:
        UserError: their categories differ; the first difference is named.
    """
    ours, theirs = list(model.names), list(reference.names)
    if ours == theirs:
        return
    beginning = f"{argument(name, reference.source)}: its categories are not those of the model"
    end = "give the float network that the model was made from"
    if len(ours) != len(theirs):
        raise UserError(f"{beginning} ({len(theirs)}, and the model's are {len(ours)}); {end}")
    index = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    raise UserError(
        f"{beginning} (category {index} is {shown(repr(theirs[index]), limit=60)}, and the model's "
        f"is {shown(repr(ours[index]), limit=60)}); {end}"
    )


def agreement(
    model: Detecting,
    reference: Detecting,
    images: ImageSet,
    *,
    progress: Progress,
    image_size: int | None = None,
    batch_size: int = BATCH_SIZE,
    interval: bool = False,
) -> Agreement:
    """Measure a network against the float one's detections on images; their labels do not count.

    Args:
        model: the network under test, of the same categories.
        reference: the float network.
        images: labelled or not.
        progress: told how far it is.
        image_size: pixels of the long side; the model's own by default.
        batch_size: images at a time.
        interval: also find `AP_interval`.

    Returns:
        The figures; where the float network detects nothing, `objects` is 0 and AP is NaN.

    Raises:
        UserError: an image cannot be read, or the size is none that both networks can take.
    """
    size = model.image_size if image_size is None else image_size
    for detector in (reference, model):
        detector.check_size(size)
    detections_by_network = []
    for name, detector in (("float", reference), ("quantized", model)):
        with progress.task(f"agreement ({name})", len(images), "images") as task:
            detections_by_network.append(
                predict(
                    detector, images, image_size=size, batch_size=batch_size, progress=task.update
                )
            )
    reference_detections, detections = detections_by_network
    counts = kept_of(reference_detections, detections)
    labelled = pseudo_labelled(images, reference_detections, len(reference.names))
    # Numbers stand for the categories: two may have one name.
    metrics = score(labelled, detections, labelled.names)
    ap_interval = None
    if interval and counts.objects and len(images) > 1:
        ap_interval = bootstrap_ap(labelled, detections, labelled.names)
    return Agreement(
        **counts.to_dict(),
        AP=metrics.AP,
        AP50=metrics.AP50,
        image_size=size,
        AP_interval=ap_interval,
    )


def pseudo_labelled(
    images: ImageSet, detections: Sequence[Detections], categories: int
) -> ImageSet:
    """The set with a network's detections as its objects, and numbers as its categories.

    Args:
        images: labelled or not; labels of its own are dropped.
        detections: one an image, in pixels of the original images; those above `REFERENCE_SCORE`
            count.
        categories: how many the network has.
    """
    items = [
        _labelled(item, image_detections)
        for item, image_detections in zip(images.items, detections, strict=True)
    ]
    return replace(
        unlabelled(images),
        names=[str(index) for index in range(categories)],
        items=items,
        labelled=True,
        numbered=True,
    )


def unlabelled(images: ImageSet) -> ImageSet:
    """The images of a set, as if they had been found without labels."""
    return ImageSet(
        images.source,
        [],
        [_bare(item) for item in images.items],
        labelled=False,
        split=images.split,
    )


def _bare(item: Item) -> Item:
    nothing = np.zeros(0)
    return replace(
        item,
        boxes=nothing.reshape(0, 4).astype(np.float32),
        labels=nothing.astype(np.int64),
        ignore=nothing.astype(bool),
        area=nothing.astype(np.float32),
        segments=(),
    )


def _labelled(item: Item, detections: Detections) -> Item:
    rows = _certain(detections)
    boxes = detections.boxes[rows].numpy().astype(np.float32)
    return replace(
        item,
        boxes=boxes,
        labels=detections.labels[rows].numpy(),
        ignore=np.zeros(len(boxes), dtype=bool),
        area=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        segments=(),
    )


def _certain(detections: Detections, above: float = REFERENCE_SCORE) -> Tensor:
    """Which of a float network's detections are taken for objects: bool `(n,)`."""
    return (detections.scores > above) & torch.from_numpy(usable(detections.boxes.numpy()))


def on_squares(model: Detector, reference: Detector, pixels: Tensor) -> Kept:
    """`kept_of` on images as the networks take them.

    Args:
        model, reference: on one device, in eval mode.
        pixels: uint8 `(n, 3, h, w)`.
    """
    reference_detections: list[Detections] = []
    detections: list[Detections] = []
    for batch in pixels.split(BATCH_SIZE):
        images = batch.to(model.device).float() / 255
        for detector, by_image in ((reference, reference_detections), (model, detections)):
            by_image += [_on_cpu(image_detections) for image_detections in detector.detect(images)]
    return kept_of(reference_detections, detections)


def _on_cpu(detections: Detections) -> Detections:
    return Detections(detections.boxes.cpu(), detections.scores.cpu(), detections.labels.cpu())

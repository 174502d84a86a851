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
from ..models.base import Detecting, Detections, Detector
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
    found: Sequence[Detections],
    above: float = REFERENCE_SCORE,
) -> Kept:
    """What of a float network's detections another network has.

    As in COCO's evaluation, detections are taken by falling score, and each is matched with the
    object of its category that it overlaps most and that none before it was matched with.

    Args:
        reference: the float network's, one an image, on the CPU.
        found: the other network's on the same images.
        above: detections of the float network whose score is not above it are no objects.
    """
    objects, shifts, again = 0, [], 0
    for wanted, given in zip(reference, found, strict=True):
        rows = _certain(wanted, above)
        objects += int(rows.sum())
        for row, match, _ in matches(wanted, given, above):
            shifts.append(float(given.scores[row]) - float(wanted.scores[match]))
            again += bool(given.scores[row] > above)
    # Rounded: the last bits are those of the order in which sums are taken.
    shift = round(float(np.mean(shifts)), 6) if shifts else None
    return Kept(objects, len(shifts), again, shift, len(reference))


def matches(wanted: Detections, given: Detections, above: float) -> list[tuple[int, int, float]]:
    """Which detections of two networks in one image are of one object, as `kept_of` has it.

    Returns:
        Row in `given`, row in `wanted`, and IoU.
    """
    rows = _certain(wanted, above).nonzero()[:, 0]
    boxes, labels = wanted.boxes[rows], wanted.labels[rows]
    # A network that has diverged gives NaN, which overlaps nothing.
    overlaps = box_iou(given.boxes, boxes).nan_to_num(0.0)
    overlaps[given.labels[:, None] != labels] = 0.0
    overlaps[~given.scores.isfinite()] = 0.0
    found = []
    for row in given.scores.argsort(descending=True, stable=True).tolist():
        if not len(boxes) or overlaps[row].max() < SAME_BOX:
            continue
        match = int(overlaps[row].argmax())
        found.append((row, int(rows[match]), float(overlaps[row, match])))
        overlaps[:, match] = 0.0
    return found


def sentence(found: Kept, where: str) -> str:
    """What was found, for people.

    Args:
        found: the figures.
        where: the images, as in "12 held-out synthetic images".
    """
    if not found.objects:
        return (
            f"the float network detects nothing with a score above {REFERENCE_SCORE} on {where}: "
            "how close the low-bit one is cannot be said from them"
        )
    text = (
        f"of the float network's {found.objects} detections with a score above {REFERENCE_SCORE} "
        f"on {where}, {found.kept} are kept (same category, IoU at least {SAME_BOX}), "
        f"{found.kept_above} of them with a score above {REFERENCE_SCORE} again"
    )
    if found.score_shift is None:
        return text
    return f"{text}; scores shifted by {found.score_shift:+.3f} on average"


def check_categories(model: Detecting, reference: Detecting, name: str = "against") -> None:
    """Refuse two networks that do not detect the same.

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
    both = []
    for name, detector in (("float", reference), ("quantized", model)):
        with progress.task(f"agreement ({name})", len(images), "images") as task:
            both.append(
                predict(
                    detector, images, image_size=size, batch_size=batch_size, progress=task.update
                )
            )
    wanted, given = both
    counts = kept_of(wanted, given)
    labelled = pseudo_labelled(images, wanted, len(reference.names))
    # Numbers stand for the categories: two may have one name.
    found = score(labelled, given, labelled.names)
    between = None
    if interval and counts.objects and len(images) > 1:
        between = bootstrap_ap(labelled, given, labelled.names)
    return Agreement(
        **counts.to_dict(),
        AP=found.AP,
        AP50=found.AP50,
        image_size=size,
        AP_interval=between,
    )


def pseudo_labelled(images: ImageSet, found: Sequence[Detections], categories: int) -> ImageSet:
    """The set with a network's detections as its objects, and numbers as its categories.

    Args:
        images: labelled or not; labels of its own are dropped.
        found: one an image, in pixels of the original images; those above `REFERENCE_SCORE` count.
        categories: how many the network has.
    """
    items = [_labelled(item, one) for item, one in zip(images.items, found, strict=True)]
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


def _labelled(item: Item, found: Detections) -> Item:
    rows = _certain(found)
    boxes = found.boxes[rows].numpy().astype(np.float32)
    return replace(
        item,
        boxes=boxes,
        labels=found.labels[rows].numpy(),
        ignore=np.zeros(len(boxes), dtype=bool),
        area=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        segments=(),
    )


def _certain(found: Detections, above: float = REFERENCE_SCORE) -> Tensor:
    """Which of a float network's detections are taken for objects: bool `(n,)`."""
    return (found.scores > above) & torch.from_numpy(usable(found.boxes.numpy()))


def on_squares(model: Detector, reference: Detector, pixels: Tensor) -> Kept:
    """`kept_of` on images as the networks take them.

    Args:
        model, reference: on one device, in eval mode.
        pixels: uint8 `(n, 3, h, w)`.
    """
    wanted: list[Detections] = []
    given: list[Detections] = []
    for batch in pixels.split(BATCH_SIZE):
        images = batch.to(model.device).float() / 255
        for detector, rows in ((reference, wanted), (model, given)):
            rows += [_on_cpu(one) for one in detector.detect(images)]
    return kept_of(wanted, given)


def _on_cpu(one: Detections) -> Detections:
    return Detections(one.boxes.cpu(), one.scores.cpu(), one.labels.cpu())

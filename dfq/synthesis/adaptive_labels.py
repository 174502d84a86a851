"""The adaptive box-and-category sampler: labels that a detector corrects while images form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torchvision.ops import box_iou

from ..models.base import Detections
from .labels import to_corners
from .settings import LabelStage

FAINT = 0.003
"""From this score on a detection says something about the categories of the training data."""
SHAPE_SPREAD = 0.5
"""How different in ln area and ln aspect a detection may be from a label that takes its category:
the standard deviation of a Gaussian."""


class AdaptiveSampler:
    """Labels of one batch, corrected by what the teacher finds in its images as they form.

    Scattered labels keep their places: the first update gives them categories, later ones add what
    else is found. The paper's are added and dropped from the first update on.

    Args:
        detect: what the teacher finds in images, see `Detector.detect`.
        stage: settings of the label stage.
        labels: per image `(n, 5)`, as they begin.
        generator: makes the draws.

    Attributes:
        labels: as they are now.
    """

    def __init__(
        self,
        detect: Callable[..., list[Detections]],
        stage: LabelStage,
        labels: list[Tensor],
        generator: Generator,
    ) -> None:
        self.detect, self.stage, self.generator = detect, stage, generator
        self.labels = labels
        self.updates = update_steps(
            stage.iterations, start=stage.start, stop=stage.stop, updates=stage.updates
        )

    def __call__(self, step: int, images: Tensor) -> list[Tensor] | None:
        """New labels, None where an iteration leaves them as they are.

        Args:
            step: the iteration that is done, from 0.
            images: `(n, 3, s, s)` in [0, 1].
        """
        if step not in self.updates:
            return None
        stage, size = self.stage, images.shape[2]
        scattered = stage.sampler == "scattered"
        first = scattered and step == min(self.updates)
        detections = self.detect(
            images, score_threshold=FAINT if first else stage.score_threshold, iou_threshold=0.6
        )
        if first:
            self.labels = draw_categories(self.labels, detections, size, self.generator)
        else:
            self.labels = update_adaptive(
                self.labels, detections, size, smallest_area=stage.smallest_area, drop=not scattered
            )
        return self.labels


def draw_categories(
    labels: Sequence[Tensor], detections: Sequence[Detections], size: int, generator: Generator
) -> list[Tensor]:
    """Labels with categories as frequent as the teacher's own faint detections have them.

    What a detector sees in images that show nothing in particular, with scores too low to count,
    is what it saw often in training: the categories of all faint detections of a batch estimate
    how frequent they were, without any data. Each label takes the category of one of them, drawn
    with a probability that falls with the difference in size and shape, as a Gaussian of the
    logarithms of area and aspect ratio.

    Args:
        labels: per image `(n, 5)`; places and sizes stay.
        detections: with scores from `FAINT`; where there are none, the labels stay as they are.
        size: side of the images, pixels.
        generator: makes the draws.
    """
    categories = torch.cat([detected.labels.cpu() for detected in detections])
    boxes = torch.cat([detected.boxes.float().cpu() for detected in detections]) / size
    sides = boxes[:, 2:] - boxes[:, :2]
    usable = (sides > 0).all(dim=1)
    if not usable.any():
        return list(labels)
    categories, shapes = categories[usable].float(), _shape(sides[usable])
    result = []
    for label in labels:
        label = label.clone()
        if len(label):
            apart = torch.cdist(_shape(label[:, 3:]), shapes).square()
            # Relative to the closest, so that a label like no detection has one all the same.
            apart = apart - apart.amin(dim=1, keepdim=True)
            weight = torch.exp(-apart / (2 * SHAPE_SPREAD**2))
            label[:, 0] = categories[torch.multinomial(weight, 1, generator=generator)[:, 0]]
        result.append(label)
    return result


def _shape(sides: Tensor) -> Tensor:
    """Logarithms of area and of aspect ratio, `(n, 2)`, of widths and heights `(n, 2)`."""
    width, height = sides.log().unbind(dim=1)
    return torch.stack([width + height, width - height], dim=1)


def update_adaptive(
    labels: Sequence[Tensor],
    detections: Sequence[Detections],
    size: int,
    *,
    iou: float = 0.35,
    smallest_area: float = 0.01,
    largest_area: float = 0.85,
    drop: bool = True,
) -> list[Tensor]:
    """One update of the adaptive box-and-category sampler (ICCV 2025, sec. 3.2).

    Adds each detection that overlaps no label of its image by `iou` or more and whose area lies in
    (`smallest_area`, `largest_area`) of the image; removes each label that no detection overlaps by
    `iou`, but keeps in every image at least the one with the highest overlap, and all of them where
    nothing at all is detected (as the paper's public code does). Detections are taken in order of
    score and each addition counts as a label for the next, so that one object found
    under two categories is added once.

    Args:
        labels: per image `(n, 5)`.
        detections: of the present images, boxes in pixels.
        size: side of the images, pixels.
        drop: whether labels are removed at all. Where an image begins with many, hardly any shows
            at low resolution before it has had time to, though nearly all do in the end.
    """
    updated = []
    for label, detected in zip(labels, detections, strict=True):
        boxes = (detected.boxes.float().cpu() / size).clamp(0, 1)
        kept = label
        if drop and len(label) and len(detected):
            best = box_iou(to_corners(label[:, 1:]), boxes).amax(dim=1)
            keep = best >= iou
            keep[best.argmax()] = True
            kept = label[keep]
        rows = [kept]
        present = to_corners(kept[:, 1:])
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        for index in range(len(detected)):
            box = boxes[index : index + 1]
            if not smallest_area < float(area[index]) < largest_area:
                continue
            if len(present) and float(box_iou(present, box).max()) >= iou:
                continue
            centre, sides = (box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]
            category = detected.labels[index : index + 1, None].float().cpu()
            rows.append(torch.cat([category, centre, sides], dim=1))
            present = torch.cat([present, box])
        updated.append(torch.cat(rows))
    return updated


def update_steps(iterations: int, *, start: float, stop: float, updates: int) -> set[int]:
    """Iterations after which labels are updated: `updates` of them, evenly spread over the shares
    `start` to `stop` of the run."""
    spread = torch.linspace(start * iterations, stop * iterations, updates)
    return {min(int(step), iterations - 1) for step in spread}

"""What detectors with proposals share: R-CNNs of all frameworks.

The second stage of such a network gives one row a *proposal*, and which places are proposed is
itself a prediction. Two networks can therefore be compared only over the same proposals: the raw
predictions keep the feature maps, so that a student's second stage is run on its own features at
the teacher's proposals.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from .base import Detections, Detector, DistillationPair, Model, Part, Targets

DISTILLED_PROPOSALS = 256
"""Of an image, best first, that the second stages of student and teacher are compared on."""

DISTILLED_MASKS = 16
"""Of these, how many masks are predicted for: each costs as much as a hundred rows of classes."""

DETECTED_MASKS = 100
"""Of an image's detections, best first, that get a mask: as many as COCO's evaluation counts."""


class SecondStage(NamedTuple):
    """The second stage on the network's own proposals.

    Attributes:
        proposals: per image `(k_i, 4)`, x1 y1 x2 y2 in pixels, best first, at least one.
        classes: logits of a softmax `(sum k_i, classes + 1)`, background included.
        boxes: normalised offsets `(sum k_i, 4 * columns)`: for every class, or one for all.
        masks: logits `(sum min(k_i, DISTILLED_MASKS), columns, m, m)`, or None.
    """

    proposals: list[Tensor]
    classes: Tensor
    boxes: Tensor
    masks: Tensor | None


class TwoStageRaw(NamedTuple):
    """What `TwoStageDetector.raw` returns.

    Attributes:
        features: the pyramid `(n, c, h, w)` a level.
        objectness: logits `(n, anchors, h, w)` a level.
        deltas: the first stage's normalised offsets `(n, anchors * 4, h, w)` a level, the four of
            an anchor side by side.
        shape: height and width of the images.
        second: None where gradients are recorded, as it is the labels or the teacher that then say
            which proposals matter.
        owner: the detector that gave this, whose heads `features` belong to.
    """

    features: list[Tensor]
    objectness: list[Tensor]
    deltas: list[Tensor]
    shape: tuple[int, int]
    second: SecondStage | None
    owner: TwoStageDetector


class TwoStageDetector(Detector):
    """A detector that proposes boxes and then classifies them.

    Attributes:
        background: index of the background in the second stage's classes.
    """

    background: int
    _led: Sequence[tuple[Tensor, list[Tensor]]] = ()
    """Batches for which another network's proposals stand in for this one's."""

    @abstractmethod
    def _first_stage(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Features, objectness and deltas (see `TwoStageRaw`) of normalised images."""

    @abstractmethod
    def _propose(self, raw: TwoStageRaw) -> list[Tensor]:
        """Proposals of each image `(k_i, 4)`, pixels, best first, without gradients."""

    @abstractmethod
    def _pool(
        self, part: str, features: list[Tensor], boxes: list[Tensor], shape: tuple[int, int]
    ) -> Tensor:
        """Features in given boxes `(sum k_i, c, s, s)`, for one of the heads "heads" (classes and
        boxes) and "masks"."""

    @abstractmethod
    def _head(self, part: str, pooled: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the head for pooled features `(k, c, s, s)`: class logits and box offsets (see
        `SecondStage`), or mask logits `(k, columns, m, m)`."""

    def _run(
        self, part: str, features: list[Tensor], boxes: list[Tensor], shape: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        pooled = self._pool(part, features, boxes, shape)
        runner = self.runners.get(part)
        return runner(pooled) if runner else self._head(part, pooled)

    def _classify(
        self, features: list[Tensor], proposals: list[Tensor], shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Class logits and box offsets (see `SecondStage`) on given proposals."""
        classes, boxes = self._run("heads", features, proposals, shape)
        return classes, boxes

    def _segment(
        self, features: list[Tensor], boxes: list[Tensor], shape: tuple[int, int]
    ) -> Tensor:
        """Mask logits `(sum k_i, columns, m, m)` in given boxes."""
        return self._run("masks", features, boxes, shape)[0]

    def exportable(self, images: Tensor) -> TwoStageRaw:
        """The first stage for images `(n, 3, h, w)` in [0, 1]. Proposals, the features in them and
        NMS stay outside of exported files."""
        features, objectness, deltas = self._first_stage(self.normalize(images))
        shape = (images.shape[2], images.shape[3])
        return TwoStageRaw(features, objectness, deltas, shape, None, self)

    @torch.no_grad()
    def parts(self, image_size: int) -> dict[str, Part]:
        """The heads of the second stage, on features that are cut out already."""
        shape = (image_size, image_size)
        images = torch.zeros(1, 3, *shape, device=self.device)
        features = self.exportable(images).features
        whole_image = [images.new_tensor([[0.0, 0.0, *shape]])]
        names: dict[str, tuple[str, ...]] = {"heads": ("classes", "boxes")}
        if self.has_masks:
            names["masks"] = ("masks",)
        return {
            part: Part(
                partial(self._head, part),
                tuple(self._pool(part, features, whole_image, shape).shape[1:]),
                outputs,
            )
            for part, outputs in names.items()
        }

    def outputs(self, raw: TwoStageRaw, image_shape: tuple[int, int]) -> dict[str, Tensor]:
        """Feature maps, objectness and offsets of the first stage a level, of the shapes in
        `TwoStageRaw`."""
        kinds = {"features": raw.features, "objectness": raw.objectness, "deltas": raw.deltas}
        return {
            f"{kind}{index}": level
            for kind, levels in kinds.items()
            for index, level in enumerate(levels)
        }

    def raw_of(self, outputs: dict[str, Tensor], image_shape: tuple[int, int]) -> TwoStageRaw:
        """The inverse of `outputs`: raw predictions without a second stage, of the shapes in
        `TwoStageRaw`."""
        features, objectness, deltas = (
            [level for name, level in outputs.items() if name.startswith(kind)]
            for kind in ("features", "objectness", "deltas")
        )
        return TwoStageRaw(features, objectness, deltas, image_shape, None, self)

    @torch.no_grad()
    def from_outputs(
        self, outputs: dict[str, Tensor], image_shape: tuple[int, int], **thresholds: Any
    ) -> list[Detections]:
        """See `Detector.from_outputs`. Computes proposals, the second stage (with the `runners`
        where there are any) and NMS from outputs of the shapes in `TwoStageRaw`."""
        raw = self.raw_of(outputs, image_shape)
        masks = thresholds.pop("masks", False)
        detections = self.decode(raw, image_shape, **thresholds)
        return self.segment(raw, detections) if masks else detections

    def raw(self, images: Tensor) -> TwoStageRaw:
        """Predictions for images `(n, 3, h, w)`, RGB in [0, 1], h and w multiples of `stride`.

        The second stage is run where no gradients are recorded; see `TwoStageRaw.second`.
        """
        self.check_sides(images)
        features, objectness, deltas = self._first_stage(self.normalize(images))
        shape = (images.shape[2], images.shape[3])
        raw = TwoStageRaw(features, objectness, deltas, shape, None, self)
        if torch.is_grad_enabled():
            return raw
        shared = next((proposals for batch, proposals in self._led if batch is images), None)
        return raw._replace(second=self._second_stage(raw, shared or self._proposals_of(raw)))

    @contextmanager
    def shared_proposals(self, leader: Model, batches: Sequence[Tensor]) -> Iterator[None]:
        """See `Model.shared_proposals`: for batches `(n, 3, h, w)`, the second stage runs on the
        leader's proposals. A student's own are nearly the same in another order, which would count
        as noise in a comparison by place."""
        assert isinstance(leader, TwoStageDetector)
        with torch.no_grad():
            raws = (leader.raw(batch) for batch in batches)
            self._led = [
                (batch, leader.second_stage(raw).proposals)
                for batch, raw in zip(batches, raws, strict=True)
            ]
        try:
            yield
        finally:
            self._led = ()

    def second_stage(self, raw: TwoStageRaw) -> SecondStage:
        """The second stage of this network on its own proposals."""
        if raw.second is not None:
            return raw.second
        return self._second_stage(raw, self._proposals_of(raw))

    def _proposals_of(self, raw: TwoStageRaw) -> list[Tensor]:
        return [
            # A network that proposes nothing looks at the whole image.
            boxes if len(boxes) else boxes.new_tensor([[0.0, 0.0, *raw.shape[::-1]]])
            for boxes in self._propose(raw)
        ]

    def _second_stage(self, raw: TwoStageRaw, proposals: list[Tensor]) -> SecondStage:
        classes, boxes = self._classify(raw.features, proposals, raw.shape)
        masks = None
        if self.has_masks:
            best = [image_proposals[:DISTILLED_MASKS] for image_proposals in proposals]
            masks = self._segment(raw.features, best, raw.shape)
        return SecondStage(proposals, classes, boxes, masks)

    @torch.no_grad()
    def segment(self, raw: TwoStageRaw, detections: Sequence[Detections]) -> list[Detections]:
        """`detections` with masks of the `DETECTED_MASKS` best, in networks that predict them."""
        if not self.has_masks:
            return list(detections)
        best = [per_image.boxes[:DETECTED_MASKS] for per_image in detections]
        labels = torch.cat([per_image.labels[:DETECTED_MASKS] for per_image in detections])
        logits = self._segment(raw.features, best, raw.shape)
        masks = _columns(logits, labels, self._column_shift).float().sigmoid()
        counts = [len(boxes) for boxes in best]
        return [
            replace(per_image, masks=image_masks)
            for per_image, image_masks in zip(detections, masks.split(counts), strict=True)
        ]

    @torch.no_grad()
    def _target_masks(
        self, raw: TwoStageRaw, boxes: list[Tensor], labels: list[Tensor]
    ) -> list[Tensor]:
        """What `mask_targets` takes for the objects' masks, bool `(n_i, h, w)` an image.

        Args:
            boxes: `(n_i, 4)` an image, pixels.
            labels: `(n_i,)` an image, columns of what `_segment` gives.
        """
        if self.mask_targets != "own":
            return [ellipse_masks(box, raw.shape) for box in boxes]
        logits = self._segment(raw.features, boxes, raw.shape)
        small = _columns(logits, torch.cat(labels), 0).sigmoid()[:, None]
        return [
            paste_masks_in_image(masks, box, raw.shape)[:, 0] > 0.5
            for masks, box in zip(small.split([len(box) for box in boxes]), boxes, strict=True)
        ]

    def levels(self, raw: TwoStageRaw) -> list[Tensor]:
        """Of the first stage, `(n, anchors * 5, h, w)` a level: objectness, then offsets."""
        return [torch.cat(pair, dim=1) for pair in zip(raw.objectness, raw.deltas, strict=True)]

    def distillation_pairs(
        self, student_raw: TwoStageRaw, teacher_raw: TwoStageRaw
    ) -> list[DistillationPair]:
        """Objectness as Bernoulli logits and offsets of every anchor; class distributions, offsets
        and mask logits over the teacher's proposals, for student and teacher alike.

        Offsets and masks are of the class the teacher finds likeliest, and count by how sure it is
        that something is there; a mask as a whole counts as much as one distribution.
        """
        pairs = []
        for ours, theirs, our_deltas, their_deltas in zip(
            student_raw.objectness,
            teacher_raw.objectness,
            student_raw.deltas,
            teacher_raw.deltas,
            strict=True,
        ):
            weight = theirs.detach().sigmoid().unsqueeze(2)
            offsets = [deltas.unflatten(1, (-1, 4)) for deltas in (our_deltas, their_deltas)]
            pairs += [
                DistillationPair("objectness", ours, theirs.detach(), "bernoulli"),
                DistillationPair("proposal", offsets[0], offsets[1].detach(), "value", -1, weight),
            ]
        return pairs + self._second_pairs(student_raw, teacher_raw)

    def _second_pairs(
        self, student_raw: TwoStageRaw, teacher_raw: TwoStageRaw
    ) -> list[DistillationPair]:
        teacher = teacher_raw.owner.second_stage(teacher_raw)
        student = student_raw.owner
        shape = student_raw.shape
        proposals = [image_proposals[:DISTILLED_PROPOSALS] for image_proposals in teacher.proposals]
        rows = _first_rows(teacher.proposals, DISTILLED_PROPOSALS)
        classes, boxes = student._classify(student_raw.features, proposals, shape)
        their_classes = teacher.classes[rows].detach()
        present, likeliest = self.foreground(their_classes)
        offsets = [
            _columns(deltas.unflatten(1, (-1, 4)), likeliest, self._column_shift)
            for deltas in (boxes, teacher.boxes[rows].detach())
        ]
        pairs = [
            DistillationPair("class", classes, their_classes, "categorical", dim=1),
            DistillationPair("box", offsets[0], offsets[1], "value", weight=present[:, None]),
        ]
        if teacher.masks is not None:
            best = [image_proposals[:DISTILLED_MASKS] for image_proposals in teacher.proposals]
            mask_rows = _first_rows(proposals, DISTILLED_MASKS)
            ours = student._segment(student_raw.features, best, shape)
            masks = [
                _columns(logits, likeliest[mask_rows], self._column_shift)
                for logits in (ours, teacher.masks.detach())
            ]
            weight = present[mask_rows, None, None] / masks[0][0].numel()
            pairs.append(DistillationPair("mask", masks[0], masks[1], "bernoulli", weight=weight))
        return pairs

    @property
    def _column_shift(self) -> int:
        """What a class has to be shifted by to be a column of `boxes` or `masks`."""
        return 1 if self.background == 0 else 0

    def foreground(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """How likely there is an object `(k,)`, and its likeliest class, an index into `names`."""
        probabilities = logits.softmax(dim=1)
        if self.background == 0:
            objects = probabilities[:, 1:]
        else:
            objects = probabilities[:, :-1]
        return objects.sum(dim=1), objects.argmax(dim=1)


def _first_rows(groups: Sequence[Tensor], limit: int) -> Tensor:
    """Indices, into the concatenated rows of `groups`, of the first `limit` rows of each."""
    rows, start = [], 0
    for group in groups:
        rows.append(torch.arange(start, start + min(limit, len(group)), device=group.device))
        start += len(group)
    return torch.cat(rows)


def _columns(values: Tensor, classes: Tensor, shift: int) -> Tensor:
    """Row by row the column of a class out of `(k, columns, ...)`; the only one if there is one."""
    if values.shape[1] == 1:
        return values[:, 0]
    return values[torch.arange(len(values), device=values.device), classes + shift]


@contextmanager
def fixed_sampling(device: torch.device) -> Iterator[None]:
    """Seeds torch's global generator within the context, and restores its state.

    R-CNN losses are computed on a random sample of anchors and proposals. Drawn from the global
    generator, a resumed run or another process would not give the same result.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def pixel_boxes(
    targets: Targets, batch: int, shape: tuple[int, int], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Per image categories `(n_i,)` int64 and boxes `(n_i, 4)`, x1 y1 x2 y2 in pixels, clipped to
    the image; boxes of less than a tenth of a pixel are left out (losses divide by the sides)."""
    height, width = shape
    result = []
    for label in targets.to(device).per_image(batch):
        label = label.float()
        centres, half = label[:, 1:3], label[:, 3:5] / 2
        scale = label.new_tensor([width, height])
        boxes = torch.cat(
            [(centres - half).clamp(0, 1) * scale, (centres + half).clamp(0, 1) * scale], 1
        )
        keep = ((boxes[:, 2:] - boxes[:, :2]) > 0.1).all(dim=1)
        result.append((label[keep, 0].long(), boxes[keep]))
    return result


def ellipse_masks(boxes: Tensor, shape: tuple[int, int]) -> Tensor:
    """The ellipses inscribed in boxes `(n, 4)` (pixels), as bool `(n, h, w)`: pixels whose centre
    is inside. An object fills its box in part only; of convex outlines that touch all four sides
    the ellipse is the roundest guess, with pi / 4 of the box's area."""
    height, width = shape
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    radii = ((boxes[:, 2:] - boxes[:, :2]) / 2).clamp_min(1e-6)
    x = torch.arange(width, device=boxes.device) + 0.5
    y = torch.arange(height, device=boxes.device) + 0.5
    across = ((x[None] - centres[:, :1]) / radii[:, :1]).square()
    down = ((y[None] - centres[:, 1:]) / radii[:, 1:]).square()
    return across[:, None, :] + down[:, :, None] <= 1

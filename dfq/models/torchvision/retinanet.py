"""torchvision's RetinaNet as a `Detector`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from ..base import Boundary, Detections, DistillationPair, Targets
from ..two_stage import pixel_boxes
from .base import TorchvisionDetector, layers_of_backbone
from .rcnn import _thresholds


class RetinaNetRaw(NamedTuple):
    """What `TorchvisionRetinaNet.raw` returns; A is the number of anchors of all levels.

    Attributes:
        classes: logits `(n, A, classes + 1)`, one sigmoid each; the first one never learned.
        boxes: normalised offsets `(n, A, 4)`.
        grids: height and width of each level, finest first.
    """

    classes: Tensor
    boxes: Tensor
    grids: tuple[tuple[int, int], ...]


class TorchvisionRetinaNet(TorchvisionDetector):
    """`retinanet_*`. Class i of `names` is torchvision's label i + 1."""

    def raw(self, images: Tensor) -> RetinaNetRaw:
        """Predictions for images `(n, 3, h, w)`, RGB in [0, 1], h and w multiples of `stride`."""
        self.check_sides(images)
        features = self.pyramid(self.normalize(images))
        outputs = self.module.head(features)
        grids = tuple((level.shape[2], level.shape[3]) for level in features)
        return RetinaNetRaw(outputs["cls_logits"], outputs["bbox_regression"], grids)

    def _counts(self, raw: RetinaNetRaw) -> list[int]:
        cells = [height * width for height, width in raw.grids]
        return [raw.classes.shape[1] // sum(cells) * count for count in cells]

    def levels(self, raw: RetinaNetRaw) -> list[Tensor]:
        """`(n, classes + 5, anchors of the level)` a level."""
        joined = torch.cat([raw.classes, raw.boxes], dim=2).transpose(1, 2)
        return list(joined.split(self._counts(raw), dim=2))

    def _anchors(self, raw: RetinaNetRaw, shape: tuple[int, int]) -> list[Tensor]:
        batch = len(raw.classes)
        # Of images and features, only the shapes are read.
        empty = raw.classes.new_empty(1, 1, 1, 1)
        images = ImageList(empty.expand(batch, 3, *shape), [shape] * batch)
        return self.module.anchor_generator(images, [empty.expand(1, 1, *g) for g in raw.grids])

    def task_loss(
        self, raw: RetinaNetRaw, targets: Targets, image_shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """See `Detector.task_loss`: scalars, torchvision's losses "class" (focal) and "box"."""
        labelled = [
            {"labels": labels + 1, "boxes": boxes}
            for labels, boxes in pixel_boxes(
                targets, len(raw.classes), image_shape, raw.classes.device
            )
        ]
        losses = self.module.compute_loss(
            labelled,
            {"cls_logits": raw.classes, "bbox_regression": raw.boxes},
            self._anchors(raw, image_shape),
        )
        return {"class": losses["classification"], "box": losses["bbox_regression"]}

    @torch.no_grad()
    def decode(
        self,
        raw: RetinaNetRaw,
        image_shape: tuple[int, int],
        *,
        score_threshold: float = 0.001,
        iou_threshold: float = 0.6,
        max_detections: int = 300,
    ) -> list[Detections]:
        """Detections by torchvision's decoder and NMS; boxes are clipped to the image."""
        counts = self._counts(raw)
        anchors = [list(boxes.split(counts)) for boxes in self._anchors(raw, image_shape)]
        # The channel of the background is never right, but nothing keeps it from being high.
        classes = raw.classes.float().clone()
        classes[..., 0] = -torch.inf
        heads: dict[str, Any] = {
            "cls_logits": list(classes.split(counts, dim=1)),
            "bbox_regression": list(raw.boxes.float().split(counts, dim=1)),
        }
        with _thresholds(self.module, score_threshold, iou_threshold, max_detections):
            predictions = self.module.postprocess_detections(
                heads, anchors, [image_shape] * len(raw.classes)
            )
        return [
            Detections(prediction["boxes"], prediction["scores"], prediction["labels"] - 1)
            for prediction in predictions
        ]

    def distillation_pairs(
        self, student_raw: RetinaNetRaw, teacher_raw: RetinaNetRaw
    ) -> list[DistillationPair]:
        """Class logits `(n, A, classes + 1)`, and offsets `(n, A, 4)` weighted by the teacher's
        best class probability."""
        theirs = teacher_raw.classes.detach()
        weight = theirs[..., 1:].sigmoid().amax(dim=2, keepdim=True)
        return [
            DistillationPair("class", student_raw.classes, theirs, "bernoulli"),
            DistillationPair(
                "box", student_raw.boxes, teacher_raw.boxes.detach(), "value", weight=weight
            ),
        ]

    def feature_layers(self) -> list[str]:
        """The stages of the backbone and the outputs of the pyramid."""
        return layers_of_backbone(self.module, whole_stages=True)

    def blocks(self) -> list[str]:
        """The blocks of the backbone, the pyramid's convolutions, then the heads."""
        heads = ["head.classification_head", "head.regression_head"]
        return layers_of_backbone(self.module, whole_stages=False) + heads

    def boundary_layers(self) -> Boundary:
        """The convolution that sees the image; those that give classes and offsets."""
        last = ("head.classification_head.cls_logits", "head.regression_head.bbox_reg")
        return Boundary((self.first_convolution,), last)

"""torchvision's Faster and Mask R-CNN as a `Detector`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import (
    fastrcnn_loss,
    maskrcnn_loss,
)
from torchvision.models.detection.rpn import concat_box_prediction_layers

from ..base import Boundary, Detections, Targets
from ..two_stage import TwoStageDetector, TwoStageRaw, fixed_sampling, pixel_boxes
from .base import TorchvisionDetector, layers_of_backbone


class TorchvisionRCNN(TorchvisionDetector, TwoStageDetector):
    """`fasterrcnn_*` and `maskrcnn_*`. Class i of `names` is torchvision's label i + 1."""

    background = 0

    @property
    def has_masks(self) -> bool:
        return self.module.roi_heads.has_mask()

    def _first_stage(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        features = self.pyramid(x)
        objectness, deltas = self.module.rpn.head(features)
        return features, objectness, deltas

    def _anchors(self, raw: TwoStageRaw) -> list[Tensor]:
        batch = len(raw.features[0])
        # Of the images, only the shape is read.
        images = raw.features[0].new_empty(1, 1, 1, 1).expand(batch, 3, *raw.shape)
        return self.module.rpn.anchor_generator(
            ImageList(images, [raw.shape] * batch), raw.features
        )

    @torch.no_grad()
    def _propose(self, raw: TwoStageRaw) -> list[Tensor]:
        rpn = self.module.rpn
        counts = [level[0].numel() for level in raw.objectness]
        objectness, deltas = concat_box_prediction_layers(list(raw.objectness), list(raw.deltas))
        batch = len(raw.features[0])
        boxes = rpn.box_coder.decode(deltas, self._anchors(raw)).view(batch, -1, 4)
        return rpn.filter_proposals(boxes, objectness, [raw.shape] * batch, counts)[0]

    def _pool(
        self, part: str, features: list[Tensor], boxes: list[Tensor], shape: tuple[int, int]
    ) -> Tensor:
        heads = self.module.roi_heads
        pool = heads.mask_roi_pool if part == "masks" else heads.box_roi_pool
        return pool(self.named(features), boxes, [shape] * len(boxes))

    def _head(self, part: str, pooled: Tensor) -> tuple[Tensor, ...]:
        heads = self.module.roi_heads
        if part == "masks":
            return (heads.mask_predictor(heads.mask_head(pooled)),)
        return heads.box_predictor(heads.box_head(pooled))

    def task_loss(
        self, raw: TwoStageRaw, targets: Targets, image_shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """See `Detector.task_loss`: scalars, torchvision's losses "objectness", "proposal",
        "class", "box" and, of a Mask R-CNN, "mask". Anchors and proposals are sampled with one
        seed, alike at every call."""
        device = raw.features[0].device
        labelled: list[dict[str, Tensor]] = [
            {"labels": labels + 1, "boxes": boxes}
            for labels, boxes in pixel_boxes(targets, len(raw.features[0]), image_shape, device)
        ]
        if self.has_masks:
            self._add_masks(raw, labelled)
        with fixed_sampling(device):
            return {**self._proposal_loss(raw, labelled), **self._second_loss(raw, labelled)}

    def _proposal_loss(
        self, raw: TwoStageRaw, labelled: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        rpn, anchors = self.module.rpn, self._anchors(raw)
        objectness, deltas = concat_box_prediction_layers(list(raw.objectness), list(raw.deltas))
        labels, matched = rpn.assign_targets_to_anchors(anchors, labelled)
        target_offsets = rpn.box_coder.encode(matched, anchors)
        presence, offset = rpn.compute_loss(objectness, deltas, labels, target_offsets)
        return {"objectness": presence, "proposal": offset}

    def _second_loss(
        self, raw: TwoStageRaw, labelled: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        heads = self.module.roi_heads
        proposals = raw.second.proposals if raw.second is not None else self._propose(raw)
        sampled, matched, labels, target_offsets = heads.select_training_samples(
            list(proposals), labelled
        )
        classes, boxes = self._classify(raw.features, sampled, raw.shape)
        category, box = fastrcnn_loss(classes, boxes, labels, target_offsets)
        losses = {"class": category, "box": box}
        if self.has_masks and self.mask_targets != "none":
            positives = [label > 0 for label in labels]
            positive_boxes = [boxes[mask] for boxes, mask in zip(sampled, positives, strict=True)]
            losses["mask"] = maskrcnn_loss(
                self._segment(raw.features, positive_boxes, raw.shape),
                positive_boxes,
                [target["masks"] for target in labelled],
                [target["labels"] for target in labelled],
                [index[mask] for index, mask in zip(matched, positives, strict=True)],
            )
        return losses

    def _add_masks(self, raw: TwoStageRaw, labelled: list[dict[str, Tensor]]) -> None:
        masks = self._target_masks(
            raw, [target["boxes"] for target in labelled], [target["labels"] for target in labelled]
        )
        for target, mask in zip(labelled, masks, strict=True):
            target["masks"] = mask.to(torch.uint8)

    @torch.no_grad()
    def decode(
        self,
        raw: TwoStageRaw,
        image_shape: tuple[int, int],
        *,
        score_threshold: float = 0.001,
        iou_threshold: float = 0.6,
        max_detections: int = 300,
    ) -> list[Detections]:
        """Detections by torchvision's decoder and NMS; boxes are clipped to the image."""
        second, heads = self.second_stage(raw), self.module.roi_heads
        with _thresholds(heads, score_threshold, iou_threshold, max_detections):
            boxes, scores, labels = heads.postprocess_detections(
                second.classes.float(),
                second.boxes.float(),
                second.proposals,
                [image_shape] * len(second.proposals),
            )
        return [
            Detections(box, score, label - 1)
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ]

    def feature_layers(self) -> list[str]:
        """The stages of the backbone and the outputs of the pyramid."""
        return layers_of_backbone(self.module, whole_stages=True)

    def blocks(self) -> list[str]:
        """The blocks of the backbone, the pyramid's convolutions, then the heads."""
        heads = ["rpn.head", "roi_heads.box_head", "roi_heads.box_predictor"]
        if self.has_masks:
            heads += ["roi_heads.mask_head", "roi_heads.mask_predictor"]
        return layers_of_backbone(self.module, whole_stages=False) + heads

    def boundary_layers(self) -> Boundary:
        """The convolution that sees the image; those that give objectness, offsets, classes and
        mask logits."""
        last = [
            "rpn.head.cls_logits",
            "rpn.head.bbox_pred",
            "roi_heads.box_predictor.cls_score",
            "roi_heads.box_predictor.bbox_pred",
        ]
        if self.has_masks:
            last.append("roi_heads.mask_predictor.mask_fcn_logits")
        return Boundary((self.first_convolution,), tuple(last))


@contextmanager
def _thresholds(heads: Any, score: float, iou: float, count: int) -> Iterator[None]:
    """torchvision keeps them on the module."""
    before = heads.score_thresh, heads.nms_thresh, heads.detections_per_img
    heads.score_thresh, heads.nms_thresh, heads.detections_per_img = score, iou, count
    try:
        yield
    finally:
        heads.score_thresh, heads.nms_thresh, heads.detections_per_img = before

"""mmdet's Faster and Mask R-CNN, on any backbone, as a `Detector`."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from mmdet.structures.bbox import bbox2roi
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch import Tensor

from ..base import Boundary, Detections, Targets
from ..two_stage import TwoStageDetector, TwoStageRaw, fixed_sampling, pixel_boxes
from .base import MMDetDetector, backbone_layers, metas, neck_layers, scalars


class MMDetTwoStage(MMDetDetector, TwoStageDetector):
    """A detector of mmdet with an RPN and a `StandardRoIHead`."""

    background = -1

    @property
    def has_masks(self) -> bool:
        return bool(self.module.roi_head.with_mask)

    def _first_stage(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        features = self.features_of(x)
        objectness, deltas = self.module.rpn_head(tuple(features))
        return features, list(objectness), list(deltas)

    @torch.no_grad()
    def _propose(self, raw: TwoStageRaw) -> list[Tensor]:
        return [proposals.bboxes for proposals in self._proposals(raw)]

    def _proposals(self, raw: TwoStageRaw) -> list[Any]:
        batch = len(raw.features[0])
        return self.module.rpn_head.predict_by_feat(
            [level.detach().float() for level in raw.objectness],
            [level.detach().float() for level in raw.deltas],
            batch_img_metas=metas(batch, raw.shape),
            cfg=self.module.rpn_head.test_cfg,
        )

    def _pool(
        self, part: str, features: list[Tensor], boxes: list[Tensor], shape: tuple[int, int]
    ) -> Tensor:
        head = self.module.roi_head
        extract = head.mask_roi_extractor if part == "masks" else head.bbox_roi_extractor
        return extract(tuple(features)[: extract.num_inputs], bbox2roi(boxes))

    def _head(self, part: str, pooled: Tensor) -> tuple[Tensor, ...]:
        head = self.module.roi_head
        if head.with_shared_head:
            pooled = head.shared_head(pooled)
        return (head.mask_head(pooled),) if part == "masks" else head.bbox_head(pooled)

    def task_loss(
        self, raw: TwoStageRaw, targets: Targets, image_shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """See `Detector.task_loss`: scalars, mmdet's losses "rpn_cls", "rpn_bbox", "cls", "bbox"
        and, with masks, "mask". Anchors and proposals are sampled with one seed, alike at every
        call."""
        batch, device = len(raw.features[0]), raw.features[0].device
        labelled = [
            InstanceData(labels=labels, bboxes=boxes)
            for labels, boxes in pixel_boxes(targets, batch, image_shape, device)
        ]
        boxes_alone = [
            InstanceData(labels=torch.zeros_like(instances.labels), bboxes=instances.bboxes)
            for instances in labelled
        ]
        with fixed_sampling(device):
            losses = self.module.rpn_head.loss_by_feat(
                raw.objectness,
                raw.deltas,
                batch_gt_instances=boxes_alone,
                batch_img_metas=metas(batch, image_shape),
            )
            return {**scalars(losses), **scalars(self._second_losses(raw, labelled))}

    def _second_losses(self, raw: TwoStageRaw, labelled: list[Any]) -> dict[str, Any]:
        head, features = self.module.roi_head, tuple(raw.features)
        samples = []
        with torch.no_grad():
            proposals = raw.second.proposals if raw.second is not None else self._propose(raw)
        for index, (boxes, truth) in enumerate(zip(proposals, labelled, strict=True)):
            priors = InstanceData(priors=boxes)
            assigned = head.bbox_assigner.assign(priors, truth, None)
            levels = [level[index][None] for level in features]
            samples.append(head.bbox_sampler.sample(assigned, priors, truth, feats=levels))
        box_results = head.bbox_loss(features, samples)
        losses = dict(box_results["loss_bbox"])
        if self.has_masks and self.mask_targets != "none":
            self._add_masks(raw, labelled)
            mask_results = head.mask_loss(features, samples, box_results["bbox_feats"], labelled)
            losses.update(mask_results["loss_mask"])
        return losses

    def _add_masks(self, raw: TwoStageRaw, labelled: list[Any]) -> None:
        masks = self._target_masks(
            raw,
            [instances.bboxes for instances in labelled],
            [instances.labels for instances in labelled],
        )
        for instances, mask in zip(labelled, masks, strict=True):
            instances.masks = BitmapMasks(mask.cpu().numpy().astype(np.uint8), *raw.shape)

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
        """Detections by mmdet's decoder and NMS; boxes are clipped to the image."""
        second, head = self.second_stage(raw), self.module.roi_head
        settings = copy.deepcopy(head.test_cfg)
        settings.score_thr, settings.max_per_img = score_threshold, max_detections
        settings.nms.iou_threshold = iou_threshold
        counts = [len(boxes) for boxes in second.proposals]
        predictions = head.bbox_head.predict_by_feat(
            rois=bbox2roi(second.proposals).split(counts),
            cls_scores=second.classes.float().split(counts),
            bbox_preds=second.boxes.float().split(counts),
            batch_img_metas=metas(len(counts), image_shape),
            rcnn_test_cfg=settings,
        )
        return [
            Detections(instances.bboxes, instances.scores, instances.labels)
            for instances in predictions
        ]

    def blocks(self) -> list[str]:
        """The blocks of the backbone, the pyramid's convolutions, then the heads."""
        heads = ["rpn_head", "roi_head.bbox_head"]
        if self.has_masks:
            heads.append("roi_head.mask_head")
        backbone = backbone_layers(self.module, whole_stages=False)
        return backbone + neck_layers(self.module, inner=True) + heads

    def boundary_layers(self) -> Boundary:
        """The layer that sees the image; those that give objectness, offsets, classes and mask
        logits."""
        last = [
            "rpn_head.rpn_cls",
            "rpn_head.rpn_reg",
            "roi_head.bbox_head.fc_cls",
            "roi_head.bbox_head.fc_reg",
        ]
        if self.has_masks:
            last.append("roi_head.mask_head.conv_logits")
        present = {name for name, _ in self.module.named_modules()}
        return Boundary((self.first_layer,), tuple(name for name in last if name in present))

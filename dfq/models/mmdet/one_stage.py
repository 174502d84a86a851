"""mmdet's detectors with one head: dense ones (RetinaNet, FCOS, ATSS, RTMDet, YOLOX) and DETRs."""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import torch
from mmdet.models.detectors import DetectionTransformer
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ...errors import UserError
from ..base import Boundary, Detections, DistillationPair, Targets
from ..two_stage import fixed_sampling, pixel_boxes
from .base import MMDetDetector, backbone_layers, metas, neck_layers, scalars


class OneStageRaw(NamedTuple):
    """What `MMDetOneStage.raw` returns.

    Attributes:
        outputs: what the head gives: class logits, boxes and, in some, a score of the place; each a
            list of maps `(n, channels, h, w)` a level or, of a DETR, one tensor
            `(decoder layers, n, queries, channels)`.
        batch: the number of images.
    """

    outputs: tuple[Any, ...]
    batch: int


class MMDetOneStage(MMDetDetector):
    """A detector of mmdet whose `bbox_head` takes the feature maps."""

    @property
    def _queries(self) -> bool:
        return isinstance(self.module, DetectionTransformer)

    def raw(self, images: Tensor) -> OneStageRaw:
        """Predictions for images `(n, 3, h, w)`, RGB in [0, 1], h and w multiples of `stride`."""
        self.check_sides(images)
        features = tuple(self.features_of(self.normalize(images)))
        head = self.module.bbox_head
        if self._queries:
            shape = (images.shape[2], images.shape[3])
            samples = [DetDataSample(metainfo=meta) for meta in metas(len(images), shape)]
            outputs = head(**self.module.forward_transformer(features, samples))
        else:
            outputs = head(features)
        return OneStageRaw(tuple(outputs), len(images))

    def levels(self, raw: OneStageRaw) -> list[Tensor]:
        """All outputs of a level, `(n, channels, h, w)`; of a DETR, those of its last decoder layer
        `(n, channels, queries)`."""
        if self._queries:
            return [torch.cat([output[-1] for output in raw.outputs], dim=2).transpose(1, 2)]
        return [torch.cat(parts, dim=1) for parts in zip(*raw.outputs, strict=True)]

    def task_loss(
        self, raw: OneStageRaw, targets: Targets, image_shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """See `Detector.task_loss`: scalars, the losses of mmdet's head by its names without
        "loss_" ("cls", "bbox", ...)."""
        head, device = self.module.bbox_head, next(self.module.parameters()).device
        labelled = [
            InstanceData(labels=labels, bboxes=boxes)
            for labels, boxes in pixel_boxes(targets, raw.batch, image_shape, device)
        ]
        outputs = raw.outputs
        if getattr(head, "norm_on_bbox", False):
            # Out of training the head gives pixels, its loss takes strides.
            boxes = [box / stride for box, stride in zip(outputs[1], head.strides, strict=True)]
            outputs = (outputs[0], boxes, *outputs[2:])
        # What a DETR of two stages proposes; dfq takes those of one stage, which propose nothing.
        proposed = ("enc_cls_scores", "enc_bbox_preds")
        expected = inspect.signature(head.loss_by_feat).parameters
        absent = {name: None for name in proposed if name in expected}
        with fixed_sampling(device):
            losses = head.loss_by_feat(
                *outputs,
                **absent,
                batch_gt_instances=labelled,
                batch_img_metas=metas(raw.batch, image_shape),
                batch_gt_instances_ignore=None,
            )
        return scalars(losses)

    @torch.no_grad()
    def decode(
        self,
        raw: OneStageRaw,
        image_shape: tuple[int, int],
        *,
        score_threshold: float = 0.001,
        iou_threshold: float = 0.6,
        max_detections: int = 300,
    ) -> list[Detections]:
        """Detections by mmdet's decoder and, but for DETRs, its NMS."""
        head = self.module.bbox_head
        options: dict[str, Any] = {"batch_img_metas": metas(raw.batch, image_shape)}
        if "cfg" in inspect.signature(head.predict_by_feat).parameters:
            settings = copy.deepcopy(head.test_cfg)
            settings.score_thr, settings.max_per_img = score_threshold, max_detections
            if "nms" in settings:
                settings.nms.iou_threshold = iou_threshold
            options["cfg"] = settings
        outputs = [
            [level.float() for level in output] if isinstance(output, list | tuple) else output
            for output in raw.outputs
        ]
        predictions = head.predict_by_feat(*outputs, rescale=False, **options)
        return [
            _detections(instances, score_threshold, max_detections) for instances in predictions
        ]

    def distillation_pairs(
        self, student_raw: OneStageRaw, teacher_raw: OneStageRaw
    ) -> list[DistillationPair]:
        """Class logits as what the head trains them as; boxes as distributions where they are, else
        as values in units of the teacher's spread, weighted by its best class probability; the
        score of a place as Bernoulli logits. Of a DETR, its last decoder layer."""
        if self._queries:
            return self._query_pairs(student_raw, teacher_raw)
        pairs = []
        ours, theirs = (list(zip(*raw.outputs, strict=True)) for raw in (student_raw, teacher_raw))
        for student, teacher in zip(ours, theirs, strict=True):
            pairs += self._level_pairs(student, tuple(part.detach() for part in teacher))
        return pairs

    def _level_pairs(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]
    ) -> list[DistillationPair]:
        head = self.module.bbox_head
        columns = int(head.cls_out_channels)
        ours, theirs = (level[0].unflatten(1, (-1, columns)) for level in (student, teacher))
        sigmoid = bool(getattr(head, "use_sigmoid_cls", True))
        if sigmoid:
            sure = theirs.sigmoid().amax(dim=2, keepdim=True)
        else:
            sure = theirs.softmax(dim=2)[:, :, :-1].sum(dim=2, keepdim=True)
        kind: Any = "bernoulli" if sigmoid else "categorical"
        pairs = [DistillationPair("class", ours, theirs, kind, dim=2)]
        for index in range(2, len(student)):
            sure = sure * teacher[index].sigmoid().unflatten(1, (-1, 1))
            pairs.append(DistillationPair("place", student[index], teacher[index], "bernoulli"))
        anchors = theirs.shape[1]
        sides = student[1].shape[1] // anchors
        if sides == 4:
            boxes = [level[1].unflatten(1, (anchors, 4)) for level in (student, teacher)]
            spread = boxes[1].square().mean().sqrt().clamp_min(1e-6)
            pairs.append(
                DistillationPair("box", boxes[0] / spread, boxes[1] / spread, "value", -1, sure)
            )
        elif sides == 4 * (int(getattr(head, "reg_max", 0)) + 1):
            boxes = [level[1].unflatten(1, (anchors, 4, -1)) for level in (student, teacher)]
            weight = sure.unsqueeze(3)
            pairs.append(DistillationPair("box", boxes[0], boxes[1], "categorical", 3, weight))
        else:
            raise UserError(
                f"{self.source}: {type(head).__name__} gives {sides} numbers for a box; dfq knows "
                "four, or four distributions"
            )
        return pairs

    def _query_pairs(
        self, student_raw: OneStageRaw, teacher_raw: OneStageRaw
    ) -> list[DistillationPair]:
        sigmoid = bool(self.module.bbox_head.loss_cls.use_sigmoid)
        theirs = teacher_raw.outputs[0][-1].detach()
        if sigmoid:
            sure = theirs.sigmoid().amax(dim=2, keepdim=True)
        else:
            sure = theirs.softmax(dim=2)[..., :-1].sum(dim=2, keepdim=True)
        kind: Any = "bernoulli" if sigmoid else "categorical"
        boxes = student_raw.outputs[1][-1], teacher_raw.outputs[1][-1].detach()
        return [
            DistillationPair("class", student_raw.outputs[0][-1], theirs, kind, dim=2),
            DistillationPair("box", *boxes, "value", -1, sure),
        ]

    def blocks(self) -> list[str]:
        """The blocks of the backbone, the neck's convolutions, then the head."""
        backbone = backbone_layers(self.module, whole_stages=False)
        return [*backbone, *neck_layers(self.module, inner=True), "bbox_head"]

    def boundary_layers(self) -> Boundary:
        """The layer that sees the image; the head's layers after which nothing follows: those whose
        outputs are as many as a prediction has channels."""
        head = self.module.bbox_head
        sizes = _prediction_sizes(head)
        last = tuple(
            f"bbox_head.{name}"
            for name, layer in head.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.shape[0] in sizes
        )
        return Boundary((self.first_layer,), last)


def _prediction_sizes(head: Any) -> set[int]:
    anchors = int(getattr(head, "num_base_priors", 1))
    classes = int(getattr(head, "cls_out_channels", head.num_classes))
    bins = int(getattr(head, "reg_max", 0)) + 1
    return {anchors * classes, anchors * 4, anchors * 4 * bins, anchors}


def _detections(instances: Any, score_threshold: float, most: int) -> Detections:
    boxes = getattr(instances.bboxes, "tensor", instances.bboxes)
    order = instances.scores.argsort(descending=True, stable=True)
    order = order[instances.scores[order] > score_threshold][:most]
    return Detections(
        boxes[order].float(), instances.scores[order].float(), instances.labels[order]
    )

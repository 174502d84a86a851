"""Ultralytics' anchor-free detectors: YOLO11, v8, v9, v10, 12, 26, v5u, and one's own.

The network is always built afresh from its YAML and filled with the checkpoint's tensors. It stays
in eval mode and unfused: BatchNorm statistics are what synthesis inverts.

`raw` runs the layers itself, up to the head's last convolutions. What the head does after them
depends on Ultralytics' training flag, and in eval mode is a decoding that `raw` has no use for.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import xyxy2xywh
from ultralytics.utils.tal import dist2bbox, make_anchors

from ...errors import UserError
from ..base import Boundary, Detections, Detector, DistillationPair, Targets
from ..checkpoint import Checkpoint, attribute, class_of, find_model
from ..metadata import require_names, source_of, stated
from ..rebuilt import Changes, apply_changes
from .assignment import Rule, rules_of
from .head import RawPredictions, best_pairs, predict
from .layout import IMAGE, as_tuple, boundary, features_and_blocks, gather, kept_outputs, wiring
from .loss import branch_losses
from .resolve import build, checked_yaml, other_task, read_yaml
from .weights import category_names, fingerprint_of, has_legacy_head, load_strictly, training_size


class UltralyticsDetector(Detector):
    """Any detection network of Ultralytics whose head is `Detect` or `v10Detect`."""

    family = "ultralytics"
    decode_is_pure = True
    half_images = True
    half_loss = True
    static_loss = True

    def __init__(
        self,
        module: nn.Module,
        yaml: dict[str, Any],
        names: Sequence[str],
        *,
        image_size: int,
        fingerprint: str,
        source: str,
        activations: Changes | None = None,
    ) -> None:
        self.module = module
        self.names = list(names)
        self.stride = int(module.stride.max())
        self.image_size = math.ceil(image_size / self.stride) * self.stride
        self.fingerprint = fingerprint
        self.source = source
        self._yaml = yaml
        self._activations = activations or {}
        self._nms_free = False
        require_names(self.names, int(self._head.nc), source)
        # Read off once: a layer that a quantizer puts in another's place has no wiring of its own.
        self._inputs = wiring(module.model)
        self._kept = kept_outputs(self._inputs)
        self._boundary = boundary(module.model, self._inputs, self._head_lists())
        self._features, self._blocks = features_and_blocks(module.model)
        self._blocks += [
            f"model.{len(module.model) - 1}.{name}.{level}"
            for name in self._head_lists()
            for level in range(self._head.nl)
        ]

    @staticmethod
    def matches(checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint holds a network of Ultralytics, of any task."""
        return class_of(find_model(checkpoint)).startswith("ultralytics.")

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> UltralyticsDetector:
        """Rebuild the checkpoint's network and load its tensors, every one of them.

        Raises:
            UserError: it is no detector, is fused, or does not fit the installed Ultralytics.
        """
        model = find_model(checkpoint)
        source = str(checkpoint.path)
        class_name = class_of(model).rpartition(".")[2]
        task = other_task(class_name)
        if task is not None:
            raise UserError(f"{source} is {task}: name the checkpoint of an object detector")
        yaml = checked_yaml(attribute(model, "yaml"), source)
        module = build(yaml, source, legacy_head=has_legacy_head(checkpoint))
        changes = load_strictly(module, checkpoint)
        return cls(
            module,
            yaml,
            category_names(attribute(model, "names"), yaml["nc"], source),
            image_size=training_size(model, checkpoint.root, source),
            fingerprint=checkpoint.sha256,
            source=source,
            activations=changes,
        )

    @classmethod
    def from_yaml(cls, name: str) -> UltralyticsDetector:
        """A network with random weights (seed 0) from a model YAML: a path or a shipped name.

        Raises:
            UserError: no such file, or no detector.
        """
        yaml = checked_yaml(read_yaml(name), name)
        module = build(yaml, name)
        return cls(
            module,
            yaml,
            category_names(yaml.get("names"), yaml["nc"], name),
            image_size=640,
            fingerprint=fingerprint_of(module),
            source=name,
        )

    @property
    def nms_free(self) -> bool:
        """Whether `decode` takes the one2one branch without NMS (v10, 26) instead of NMS.

        False at first, as in Ultralytics (8.4.190), whose `nms=False` is the same choice.
        """
        return self._nms_free

    @nms_free.setter
    def nms_free(self, value: bool) -> None:
        if value and not self._has_one2one:
            raise UserError(f"{self.source} has no one-to-one branch: it cannot do without NMS")
        self._nms_free = value

    @property
    def _head(self) -> Any:
        return self.module.model[-1]

    @property
    def _has_one2one(self) -> bool:
        return getattr(self._head, "one2one_cv2", None) is not None

    def _head_lists(self) -> tuple[str, ...]:
        one2one = ("one2one_cv2", "one2one_cv3") if self._has_one2one else ()
        return ("cv2", "cv3", *one2one)

    def raw(self, images: Tensor) -> RawPredictions:
        """Predictions for images `(n, 3, h, w)`, RGB in [0, 1], h and w multiples of `stride`."""
        self.check_sides(images)
        current = self.normalize(images)
        outputs: dict[int, Any] = {IMAGE: current}
        layers = list(self.module.model)[:-1]
        for index, (layer, inputs) in enumerate(zip(layers, self._inputs, strict=False)):
            current = layer(gather(outputs, inputs))
            outputs[index] = current
            if index - 1 not in self._kept:
                outputs.pop(index - 1, None)
        features = [outputs[index] for index in as_tuple(self._inputs[-1])]
        head = self._head
        one2many = predict(head.cv2, head.cv3, features)
        if not self._has_one2one:
            return RawPredictions(one2many)
        return RawPredictions(one2many, predict(head.one2one_cv2, head.one2one_cv3, features))

    @functools.cached_property
    def _rules(self) -> list[tuple[float, Rule]]:
        # Of no use to a network that only detects.
        return rules_of(self.module.init_criterion())

    def levels(self, raw: RawPredictions) -> list[Tensor]:
        """Per level one tensor `(n, 4 * reg_max + classes, h, w)`, finest first; in networks with
        two branches, those of the one2many branch before those of the one2one branch."""
        levels = []
        for _, branch in raw.branches():
            # Place after place, as they lie in memory.
            joined = torch.cat([branch.boxes.mT, branch.scores.mT], dim=2)
            pieces = joined.split([height * width for height, width in branch.shapes], dim=1)
            levels += [
                piece.mT.unflatten(2, shape)
                for piece, shape in zip(pieces, branch.shapes, strict=True)
            ]
        return levels

    def task_loss(
        self, raw: RawPredictions, targets: Targets, image_shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """See `Detector.task_loss`: scalars, Ultralytics' detection loss at its default gains,
        "box" (CIoU), "class" (BCE) and "dfl".

        "dfl" is the distribution focal loss, or the L1 distance where reg_max is 1. Networks with
        two branches weigh them as Ultralytics does at the start of training."""
        data = targets.data.to(raw.one2many.boxes.device, torch.float32)
        box, category, distance = self._losses(raw, data, 1, listed=True)[0].unbind()
        return {"box": box, "class": category, "dfl": distance}

    def shard_losses(
        self, raw: RawPredictions, targets: Targets, image_shape: tuple[int, int], shards: int
    ) -> Tensor:
        """See `Model.shard_losses`: float32 `(shards,)`."""
        return self._losses(raw, targets.data, shards, listed=False).sum(1)

    def _losses(self, raw: RawPredictions, targets: Tensor, shards: int, *, listed: bool) -> Tensor:
        """The terms of all branches, weighed: `(shards, 3)`."""
        parts = []
        for (_, branch), (weight, rule) in zip(raw.branches(), self._rules, strict=True):
            part = branch_losses(branch, targets, self._strides, rule, shards=shards, listed=listed)
            parts.append(part if weight == 1 else weight * part)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    @functools.cached_property
    def _strides(self) -> tuple[int, ...]:
        return tuple(int(stride) for stride in self._head.stride)

    @torch.no_grad()
    def decode(
        self,
        raw: RawPredictions,
        image_shape: tuple[int, int],
        *,
        score_threshold: float = 0.001,
        iou_threshold: float = 0.6,
        max_detections: int = 300,
        multi_label: bool = True,
    ) -> list[Detections]:
        """Detections by Ultralytics' decoder and NMS. Boxes may reach beyond the image.

        Args:
            multi_label: whether one anchor point may give several classes, as in evaluation.
        """
        return self.from_outputs(
            self.outputs(raw, image_shape),
            image_shape,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            multi_label=multi_label,
        )

    def outputs(self, raw: RawPredictions, image_shape: tuple[int, int]) -> dict[str, Tensor]:
        """`boxes` `(n, A, 4)`, x1 y1 x2 y2 in pixels, and `scores` `(n, A, classes)` in [0, 1], of
        the branch that `decode` takes. They are never in one tensor: on one grid, steps of pixels
        would leave nothing of scores."""
        branch = (raw.one2one if self._is_nms_free else None) or raw.one2many
        points, strides = make_anchors(branch.grids(), self._head.stride, 0.5)
        boxes = strides.T * dist2bbox(
            branch.distances(), points.T.unsqueeze(0).float(), xywh=False, dim=1
        )
        return {"boxes": boxes.mT, "scores": branch.scores.float().sigmoid().mT}

    @property
    def _is_nms_free(self) -> bool:
        return self.nms_free and self._has_one2one

    @torch.no_grad()
    def from_outputs(
        self,
        outputs: dict[str, Tensor],
        image_shape: tuple[int, int],
        *,
        score_threshold: float = 0.001,
        iou_threshold: float = 0.6,
        max_detections: int = 300,
        multi_label: bool = True,
    ) -> list[Detections]:
        """Detections from `outputs`: boxes `(n, A, 4)`, scores `(n, A, classes)`. By Ultralytics'
        NMS, or, in a network that needs none, the pairs of point and class with the best scores;
        see `decode`."""
        boxes, scores = outputs["boxes"].mT, outputs["scores"].mT
        if self._is_nms_free:
            rows = best_pairs(boxes, scores, score_threshold, max_detections)
        else:
            rows = non_max_suppression(
                torch.cat([xyxy2xywh(boxes.mT).mT, scores], dim=1),
                score_threshold,
                iou_threshold,
                multi_label=multi_label,
                max_det=max_detections,
                nc=self.num_classes,
                max_time_img=math.inf,  # or a slow machine would lose the last images' boxes
            )
        return [Detections(row[:, :4], row[:, 4], row[:, 5].long()) for row in rows]

    def distillation_pairs(
        self, student_raw: RawPredictions, teacher_raw: RawPredictions
    ) -> list[DistillationPair]:
        """Per branch the class logits `(n, classes, A)` and the box distributions
        `(n, 4, reg_max, A)` over dimension 2, weighted by the teacher's best class probability.
        Where reg_max is 1 the box is the four distances `(n, 4, A)`, of kind `value`."""
        pairs = []
        for (prefix, student), (_, teacher) in zip(
            student_raw.branches(), teacher_raw.branches(), strict=True
        ):
            scores = teacher.scores.detach()
            boxes = (
                student.boxes.unflatten(1, (4, -1)),
                teacher.boxes.detach().unflatten(1, (4, -1)),
            )
            weight = scores.sigmoid().amax(dim=1).unsqueeze(1)
            pairs.append(DistillationPair(f"{prefix}class", student.scores, scores, "bernoulli"))
            if boxes[0].shape[2] == 1:
                box = DistillationPair(
                    f"{prefix}box", boxes[0].squeeze(2), boxes[1].squeeze(2), "value", weight=weight
                )
            else:
                box = DistillationPair(
                    f"{prefix}box", *boxes, "categorical", dim=2, weight=weight.unsqueeze(1)
                )
            pairs.append(box)
        return pairs

    def feature_layers(self) -> list[str]:
        """The layers before the head that have weights and give one tensor. (A concatenation or
        an upsampling repeats what its inputs already say.)"""
        return list(self._features)

    def blocks(self) -> list[str]:
        """The layers with weights, then the head's branches one by one (`cv2.0`, ...)."""
        return list(self._blocks)

    def boundary_layers(self) -> Boundary:
        """The convolutions that see the image; the last one of each branch of the head."""
        return self._boundary

    def spec(self) -> dict[str, Any]:
        """See `Detector.spec`; also holds `task`, `yaml`, `legacy_head` and `nms_free`, and
        `activations` where they are others than the YAML's."""
        return {
            "family": self.family,
            "task": "detect",
            "yaml": copy.deepcopy(self._yaml),
            "names": list(self.names),
            "image_size": self.image_size,
            "stride": self.stride,
            "legacy_head": bool(self._head.legacy),
            "nms_free": self.nms_free,
            "fingerprint": self.fingerprint,
            "source": self.source,
            **({"activations": copy.deepcopy(self._activations)} if self._activations else {}),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> UltralyticsDetector:
        source = source_of(spec)
        names, image_size, fingerprint = stated(spec, source)
        nms_free, legacy = spec.get("nms_free", False), spec.get("legacy_head")
        if not isinstance(nms_free, bool) or not isinstance(legacy, bool | None):
            raise UserError(f"the description of {source} is damaged (at 'nms_free')")
        yaml = checked_yaml(spec.get("yaml"), source)
        module = build(yaml, source, legacy_head=legacy)
        changes = spec.get("activations", {})
        apply_changes(module, changes, source)
        detector = cls(
            module,
            yaml,
            category_names(names, yaml["nc"], source),
            image_size=image_size,
            fingerprint=fingerprint,
            source=source,
            activations=changes,
        )
        detector.nms_free = nms_free
        return detector

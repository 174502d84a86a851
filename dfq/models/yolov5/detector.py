"""The original YOLOv5 (checkpoints of its own repository, v5 to v7) as a `Detector`."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ...errors import UserError
from ...runtime.plain import brief, plain_tree
from ..base import Boundary, Detections, Detector, DistillationPair, Kinds, Targets
from ..checkpoint import Checkpoint, attribute, class_of, find_model
from ..metadata import require_names, source_of, stated
from .blocks import BN_EPS
from .loss import boxes_of, losses, yolov5_loss
from .network import YOLOv5Network, activation_text
from .weights import (
    activation_of,
    are_strides,
    head_of,
    load,
    names_of,
    set_eps,
    sound_anchors,
    training_size,
)

_MOST_CANDIDATES = 30_000


class YOLOv5(Detector):
    """YOLOv5 n/s/m/l/x, with three or more levels, BatchNorm unfused.

    `raw` gives a list of logits `(n, anchors, h, w, 5 + classes)`, one a level: box (4),
    objectness, classes. Images go in as they are, RGB in [0, 1].
    """

    family = "yolov5"
    decode_is_pure = True
    half_images = True
    half_loss = True
    static_loss = True
    module: YOLOv5Network

    def __init__(
        self,
        module: YOLOv5Network,
        description: dict[str, Any],
        *,
        activation: str,
        names: list[str],
        image_size: int,
        fingerprint: str,
        source: str,
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.names = names
        self.stride = max(module.detect.strides)
        self.image_size = math.ceil(image_size / self.stride) * self.stride
        self._eps = {
            name: layer.eps
            for name, layer in module.named_modules()
            if isinstance(layer, nn.BatchNorm2d) and layer.eps != BN_EPS
        }
        self.fingerprint = fingerprint
        self.source = source
        self._description = description
        self._activation = activation

    @classmethod
    def matches(cls, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint was written by the original YOLOv5 repository.

        Raises:
            UserError: the checkpoint holds no network.
        """
        name = class_of(find_model(checkpoint)).removeprefix("yolov5.")
        return name.startswith("models.")

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> YOLOv5:
        """The detector in a checkpoint that `matches`.

        Raises:
            UserError: it is not a detection model, has been fused, or uses unsupported modules.
        """
        model = find_model(checkpoint)
        head = head_of(model, checkpoint)
        description = attribute(model, "yaml")
        if not isinstance(description, dict):
            raise UserError(
                f"{checkpoint.path} does not carry its architecture (model.yaml): "
                "name a checkpoint written by YOLOv5 v5.0 or later"
            )
        source = str(checkpoint.path)
        names = names_of(attribute(model, "names"), head, source)
        description = plain_tree({**description, "nc": len(names)}, source)
        channels = description.get("ch", 3)
        if channels != 3:
            raise UserError(
                f"{source} takes images of {brief(channels)} channels: only RGB detectors work"
            )
        anchors = attribute(head, "anchors")
        if not isinstance(anchors, Tensor) or anchors.ndim != 3:
            raise UserError(f"{source} holds no anchors: it is damaged or no YOLOv5")
        anchors = sound_anchors(anchors, source)
        activation = activation_of(model, checkpoint)
        network = YOLOv5Network(description, anchors, activation)
        load(network, model, checkpoint)
        strides = network.detect.strides
        if not are_strides(attribute(head, "stride", strides), strides):
            raise UserError(
                f"{source} has other strides than its architecture gives, {strides}: it is damaged"
            )
        return cls(
            network,
            description,
            activation=activation,
            names=names,
            image_size=training_size(checkpoint.root, max(strides), source),
            fingerprint=checkpoint.sha256,
            source=source,
        )

    @classmethod
    def from_yaml(
        cls,
        description: dict[str, Any],
        *,
        names: list[str] | None = None,
        image_size: int = 640,
        activation: str = "SiLU",
    ) -> YOLOv5:
        """A detector with random weights from an architecture description."""
        activation = activation_text(activation)
        network = YOLOv5Network(description, activation=activation)
        digest = hashlib.sha256()
        for tensor in network.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        return cls(
            network,
            plain_tree(description, "the description"),
            activation=activation,
            names=names or [f"class{index}" for index in range(int(description["nc"]))],
            image_size=image_size,
            fingerprint=digest.hexdigest(),
            source="description",
        )

    def spec(self) -> dict[str, Any]:
        return {
            "family": self.family,
            **self.stated(),
            "description": self._description,
            "anchors": self.module.detect.anchors.tolist(),
            "activation": self._activation,
            **({"eps": self._eps} if self._eps else {}),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> YOLOv5:
        source = source_of(spec)
        names, image_size, fingerprint = stated(spec, source)
        try:
            anchors = torch.tensor(spec["anchors"], dtype=torch.float32)
            description, activation = spec["description"], spec["activation"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"the description of {source} is damaged (at {error})") from error
        if not isinstance(description, dict) or anchors.ndim != 3:
            raise UserError(f"the description of {source} is damaged (at 'description')")
        require_names(names, description.get("nc"), source)
        activation = activation_text(activation)
        network = YOLOv5Network(description, sound_anchors(anchors, source), activation)
        require_names(names, network.detect.outputs - 5, source)
        set_eps(network, spec.get("eps", {}), source)
        return cls(
            network,
            description,
            activation=activation,
            names=names,
            image_size=image_size,
            fingerprint=fingerprint,
            source=source,
        )

    def raw(self, images: Tensor) -> list[Tensor]:
        """Logits `(n, anchors, h, w, 5 + classes)` a level for images `(n, 3, h, w)`, RGB in [0,
        1]."""
        self.check_sides(images)
        return self.module(self.normalize(images))

    def levels(self, raw: list[Tensor]) -> list[Tensor]:
        """`(n, anchors * (5 + classes), h, w)` a level, as the last convolutions give it."""
        return [level.permute(0, 1, 4, 2, 3).flatten(1, 2) for level in raw]

    def task_loss(
        self, raw: list[Tensor], targets: Targets, image_shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """See `Detector.task_loss` and `yolov5_loss`: scalars "box", "objectness" and "class"."""
        return yolov5_loss(raw, targets.data, self.module.detect.anchors, image_shape)

    def shard_losses(
        self, raw: list[Tensor], targets: Targets, image_shape: tuple[int, int], shards: int
    ) -> Tensor:
        """See `Model.shard_losses`: float32 `(shards,)`."""
        anchors = self.module.detect.anchors
        terms = losses(raw, targets.data, anchors, image_shape, shards=shards, listed=False)
        return terms.sum(1)

    def decode(
        self,
        raw: list[Tensor],
        image_shape: tuple[int, int],
        *,
        score_threshold: float = 0.001,
        iou_threshold: float = 0.6,
        max_detections: int = 300,
    ) -> list[Detections]:
        """Detections by the original's decoder from logits `(n, anchors, h, w, 5 + classes)` a
        level.

        Every class of a prediction whose objectness times class probability is above
        `score_threshold` counts, then NMS runs within each class. Boxes may reach beyond the image,
        as the original's do before they are scaled back."""
        return self.from_outputs(
            self.outputs(raw, image_shape),
            image_shape,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )

    def outputs(self, raw: list[Tensor], image_shape: tuple[int, int]) -> dict[str, Tensor]:
        """`boxes` `(n, A, 4)`, x1 y1 x2 y2 in pixels, and `scores` `(n, A, classes)` in [0, 1]:
        objectness times class probability; A is the number of anchors of all levels."""
        levels = [self._decode_level(level, index) for index, level in enumerate(raw)]
        boxes, scores = (torch.cat(parts, dim=1).float() for parts in zip(*levels, strict=True))
        return {"boxes": boxes, "scores": scores}

    @torch.no_grad()
    def from_outputs(
        self,
        outputs: dict[str, Tensor],
        image_shape: tuple[int, int],
        *,
        score_threshold: float = 0.001,
        iou_threshold: float = 0.6,
        max_detections: int = 300,
    ) -> list[Detections]:
        """NMS within each class, on boxes `(n, A, 4)` and scores `(n, A, classes)`; see
        `decode`."""
        return [
            _suppress(boxes, scores, score_threshold, iou_threshold, max_detections)
            for boxes, scores in zip(outputs["boxes"], outputs["scores"], strict=True)
        ]

    def _decode_level(self, logits: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Boxes `(n, anchors * h * w, 4)`, x1 y1 x2 y2 in pixels, and scores `(..., classes)`.

        They are never in one tensor: on one grid, steps of pixels would leave nothing of scores.
        """
        n, _, height, width, _ = logits.shape
        stride = self.module.detect.strides[index]
        anchors = self.module.detect.anchors[index].view(1, -1, 1, 1, 2)
        rows, columns = torch.meshgrid(
            torch.arange(height, device=logits.device),
            torch.arange(width, device=logits.device),
            indexing="ij",
        )
        centres, sizes = boxes_of(logits[..., :4], anchors)
        centres = (centres + torch.stack([columns, rows], dim=-1)) * stride
        half = sizes * (stride / 2)
        scores = logits[..., 4:5].sigmoid() * logits[..., 5:].sigmoid()
        decoded = (torch.cat([centres - half, centres + half], dim=-1), scores)
        boxes, scores = (part.reshape(n, -1, part.shape[-1]) for part in decoded)
        return boxes, scores

    def distillation_pairs(
        self, student_raw: list[Tensor], teacher_raw: list[Tensor]
    ) -> list[DistillationPair]:
        """Classes and objectness as Bernoulli logits `(n, anchors, h, w, classes)` and `(..., 1)`,
        boxes as their sigmoids `(..., 4)`, a level each.

        Classes and boxes mean something only where there is an object, so they are weighted by the
        teacher's objectness `(..., 1)`."""
        pairs = []
        for student, teacher in zip(student_raw, teacher_raw, strict=True):
            weight = teacher[..., 4:5].detach().sigmoid()
            pairs += [
                DistillationPair(
                    "class", student[..., 5:], teacher[..., 5:], "bernoulli", weight=weight
                ),
                DistillationPair("objectness", student[..., 4:5], teacher[..., 4:5], "bernoulli"),
                DistillationPair(
                    "box",
                    student[..., :4].sigmoid(),
                    teacher[..., :4].sigmoid(),
                    "value",
                    weight=weight,
                ),
            ]
        return pairs

    def feature_layers(self) -> list[str]:
        return self.blocks()[:-1]

    def blocks(self) -> list[str]:
        return [
            f"model.{name}"
            for name, layer in self.module.model.named_children()
            if any(True for _ in layer.parameters())
        ]

    def prediction_kinds(self) -> dict[str, Kinds]:
        """Centres, sides, objectness and classes by anchor, which one convolution a level gives."""
        head = self.module.detect
        kinds = Kinds(head.anchors.shape[1], (2, 2, 1, head.outputs - 5))
        return dict.fromkeys(self.boundary_layers().last, kinds)

    def boundary_layers(self) -> Boundary:
        convolutions = [
            name for name, layer in self.module.named_modules() if isinstance(layer, nn.Conv2d)
        ]
        return Boundary(
            first=(convolutions[0],),
            last=tuple(convolutions[-len(self.module.detect.m) :]),
        )


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
) -> Detections:
    """NMS within each class over the predictions of one image, `(n, 4)` and `(n, classes)`."""
    row, label = (scores > score_threshold).nonzero(as_tuple=True)
    scores = scores[row, label]
    if len(scores) > _MOST_CANDIDATES:
        scores, best = scores.topk(_MOST_CANDIDATES)
        row, label = row[best], label[best]
    boxes = boxes[row]
    kept = batched_nms(boxes, scores, label, iou_threshold)[:max_detections]
    return Detections(boxes[kept], scores[kept], label[kept])

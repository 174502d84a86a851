"""What the adapters of torchvision's detectors have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...runtime.limits import WIDEST
from ...runtime.plain import brief
from ..base import Detector
from ..checkpoint import Checkpoint, tensors_of
from ..metadata import listed_names, source_of, stated
from .networks import (
    COCO_CLASSES,
    build,
    classes_of,
    default_names,
    fill,
    fingerprint,
    letterbox_side,
    released_epsilon,
)

PREFIX = "torchvision/"


class TorchvisionDetector(Detector):
    """A network of `torchvision_models.MODELS`.

    Images are normalised here and not resized: torchvision's own resizing is left out, as the
    caller decides on the size.
    """

    family = "torchvision"

    def __init__(
        self,
        module: nn.Module,
        name: str,
        names: Sequence[str],
        *,
        options: dict[str, Any] | None = None,
        epsilon: float | None = None,
        image_size: int | None = None,
        fingerprint: str,
        source: str,
    ) -> None:
        self.module = module
        self.names = list(names)
        self.stride = 32
        transform = module.transform
        size = image_size or letterbox_side(
            max(transform.min_size), transform.max_size, self.stride
        )
        self.image_size = math.ceil(size / self.stride) * self.stride
        self.fingerprint = fingerprint
        self.source = source
        self._name = name
        self._options = dict(options or {})
        self._epsilon = epsilon
        self._mean, self._std = list(transform.image_mean), list(transform.image_std)
        self._keys: list[str] = []
        # torchvision counts the pyramid in.
        self.backbone = "backbone.body" if hasattr(module.backbone, "fpn") else "backbone"

    def normalize(self, images: Tensor) -> Tensor:
        """Subtract the mean from images `(n, 3, h, w)` and divide by the standard deviation that
        the network was trained with."""
        mean = images.new_tensor(self._mean).view(1, 3, 1, 1)
        std = images.new_tensor(self._std).view(1, 3, 1, 1)
        return (images - mean) / std

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Feature maps `(n, c, h, w)` a level, finest first, of normalised images `(n, 3, h,
        w)`."""
        features = self.module.backbone(x)
        if isinstance(features, Tensor):
            features = {"0": features}
        self._keys = list(features)
        return list(features.values())

    def named(self, features: list[Tensor]) -> dict[str, Tensor]:
        """The feature maps of `pyramid`, `(n, c, h, w)` each, under torchvision's names."""
        if not self._keys:
            with torch.no_grad():
                self.pyramid(torch.zeros(1, 3, self.stride, self.stride, device=self.device))
        return dict(zip(self._keys, features, strict=True))

    @property
    def first_convolution(self) -> str:
        """Name of the convolution that sees the image."""
        return next(n for n, m in self.module.named_modules() if isinstance(m, nn.Conv2d))

    def spec(self) -> dict[str, Any]:
        """See `Detector.spec`; also holds `network`, `options` and `epsilon`."""
        return {
            "family": self.family,
            "network": self._name,
            "options": dict(self._options),
            "epsilon": self._epsilon,
            **self.stated(),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Detector:
        source = source_of(spec)
        names, size, digest = stated(spec, source)
        name, options, epsilon = (spec.get(key) for key in ("network", "options", "epsilon"))
        if not isinstance(name, str) or not isinstance(options, dict):
            raise UserError(f"the description of {source} is damaged (at 'network')")
        if epsilon is not None and not (type(epsilon) in (int, float) and 0 <= epsilon < 1):
            raise UserError(f"{source} has {brief(epsilon)} for the eps of its BatchNorms")
        _check_options(options, source)
        module = build(name, len(names) + 1, options, epsilon=epsilon)
        return _class_for(name)(
            module,
            name,
            names,
            options=options,
            epsilon=epsilon,
            image_size=size,
            fingerprint=digest,
            source=source,
        )


def _check_options(options: dict[str, Any], source: str) -> None:
    """Refuse what is passed to a network's constructor and is not numbers.

    Raises:
        UserError: names the option.
    """
    for key, value in options.items():
        parts = value if isinstance(value, list) else [value]
        if not all(part is None or _is_moderate(part) for part in parts) or len(parts) > 64:
            raise UserError(f"{source}: the option {brief(key)} is {brief(value)}, no numbers")


def _is_moderate(value: Any) -> bool:
    return isinstance(value, bool | int | float) and abs(value) <= WIDEST


def _class_for(name: str) -> type[TorchvisionDetector]:
    from .rcnn import TorchvisionRCNN
    from .retinanet import TorchvisionRetinaNet

    return TorchvisionRetinaNet if name.startswith("retinanet") else TorchvisionRCNN


def from_name(
    name: str, checkpoint: Checkpoint | None = None, *, options: dict[str, Any] | None = None
) -> TorchvisionDetector:
    """A network by torchvision's name, with random weights (seed 0) or those of a checkpoint.

    Args:
        name: a key of `torchvision_models.MODELS`.
        checkpoint: a state dict, bare or under "model" or "state_dict"; category names may stand
            beside it under "names" (a list, without the background).
        options: passed to the network's constructor.

    Raises:
        UserError: unknown name, or a checkpoint that does not fit.
    """
    options = dict(options or {})
    if checkpoint is None:
        module = build(name, COCO_CLASSES, options)
        digest, source = fingerprint(module), f"{PREFIX}{name}"
        names, epsilon = default_names(COCO_CLASSES), None
    else:
        source, digest = str(checkpoint.path), checkpoint.sha256
        tensors = tensors_of(checkpoint)
        epsilon = released_epsilon(name, digest)
        count = classes_of(name, tensors, source)
        module = build(name, count, options, epsilon=epsilon)
        fill(module, tensors, source)
        names = _names_in(checkpoint, count)
    return _class_for(name)(
        module, name, names, options=options, epsilon=epsilon, fingerprint=digest, source=source
    )


def _names_in(checkpoint: Checkpoint, count: int) -> list[str]:
    stored_names = checkpoint.root.get("names") if isinstance(checkpoint.root, dict) else None
    if stored_names is None or isinstance(stored_names, Tensor):
        return default_names(count)
    names = listed_names(stored_names, str(checkpoint.path))
    if len(names) != count - 1:
        raise UserError(
            f"{checkpoint.path}: its {len(names)} names do not fit its {count - 1} classes (give "
            "a list, without the background)"
        )
    return names


def layers_of_backbone(module: Any, *, whole_stages: bool) -> list[str]:
    """Parts of backbone and pyramid that have weights and give one tensor, in order.

    Args:
        whole_stages: a ResNet's stages as a whole, and of the pyramid the outputs only; else every
            block, and the pyramid's inner convolutions too.
    """
    pyramid = hasattr(module.backbone, "fpn")
    body, prefix = (
        (module.backbone.body, "backbone.body") if pyramid else (module.backbone, "backbone")
    )
    names = []
    for name, stage in body.named_children():
        if next(stage.parameters(), None) is None or isinstance(stage, nn.BatchNorm2d):
            continue
        if name.startswith("layer") and not whole_stages:
            names += [f"{prefix}.{name}.{block}" for block, _ in stage.named_children()]
        elif not (whole_stages and isinstance(stage, nn.Conv2d)):
            names.append(f"{prefix}.{name}")
    if pyramid:
        parts = ["layer_blocks"] if whole_stages else ["inner_blocks", "layer_blocks"]
        for part in parts:
            names += [
                f"backbone.fpn.{part}.{level}"
                for level in range(len(getattr(module.backbone.fpn, part)))
            ]
    return names

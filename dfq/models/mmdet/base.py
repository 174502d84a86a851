"""What the adapters of mmdet's detectors have in common, and how one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...runtime.plain import one_line
from ..base import Detector, Targets
from ..checkpoint import Checkpoint, tensors_of
from ..metadata import require_names, source_of, stated
from ..torchvision.networks import fill, fingerprint
from .config import (
    build_model,
    category_names,
    image_side,
    plain,
    prepared,
    quiet,
    read_config,
    require_mmdet,
)
from .spec import check_spec

# Here, so that a pickled detector finds mmdet importable in the process that reads it.
require_mmdet()


class MMDetDetector(Detector):
    """A detector built by mmdet from a config.

    Images are normalised here as its data preprocessor does; padding and resizing are the caller's.
    """

    family = "mmdet"
    backbone = "backbone"

    def __init__(
        self,
        module: nn.Module,
        config: dict[str, Any],
        names: Sequence[str],
        *,
        image_size: int,
        fingerprint: str,
        source: str,
    ) -> None:
        self.module = module
        self.names = list(names)
        self.stride = _stride(module)
        self.image_size = max(1, round(image_size / self.stride)) * self.stride
        self.fingerprint = fingerprint
        self.source = source
        self._config = config
        self.module.data_preprocessor.eval()

    def normalize(self, images: Tensor) -> Tensor:
        """RGB `(n, 3, h, w)` in [0, 1] to the range, order of channels, mean and standard deviation
        of mmdet's pipeline, which reads images as BGR from 0 to 255."""
        settings = self.module.data_preprocessor
        x = images * 255
        if not settings._channel_conversion:
            x = x.flip(1)
        if settings._enable_normalize:
            mean, std = settings.mean.to(images), settings.std.to(images)
            x = (x - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
        return x

    def features_of(self, x: Tensor) -> list[Tensor]:
        """Feature maps `(n, c, h, w)` a level, as the heads take them, of normalised images
        `(n, 3, h, w)`."""
        return list(self.module.extract_feat(x))

    @property
    def first_layer(self) -> str:
        """Name of the layer that sees the image."""
        return next(
            name for name, m in self.module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
        )

    def feature_layers(self) -> list[str]:
        """The stages of a convolutional backbone, the blocks of a Swin, the outputs of the neck."""
        return backbone_layers(self.module, whole_stages=True) + neck_layers(self.module)

    def attention_layers(self) -> list[str]:
        """The window attentions of a Swin."""
        from mmdet.models.backbones.swin import WindowMSA

        return [name for name, m in self.module.named_modules() if isinstance(m, WindowMSA)]

    def spec(self) -> dict[str, Any]:
        """See `Detector.spec`; also holds `config`, the `model` part of the config."""
        return {
            "family": self.family,
            "config": self._config,
            **self.stated(),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Detector:
        source = source_of(spec)
        names, size, digest = stated(spec, source)
        config: dict[str, Any] = spec.get("config", {})
        check_spec(config, source)
        module = build_model(config, source, tried=True)
        kind = class_for(module, source)
        require_names(names, _class_count(module), source)
        return kind(module, config, names, image_size=size, fingerprint=digest, source=source)


def class_for(module: Any, source: str) -> type[MMDetDetector]:
    """The adapter for a network.

    Raises:
        UserError: there is none.
    """
    from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead

    from .one_stage import MMDetOneStage
    from .two_stage import MMDetTwoStage

    kind = type(module).__name__
    if getattr(module, "roi_head", None) is not None:
        head = module.roi_head
        usable = isinstance(head, StandardRoIHead) and not isinstance(head, CascadeRoIHead)
        if not usable or not hasattr(module, "rpn_head"):
            raise UserError(
                f"{source}: a {kind} with {type(head).__name__} is not supported; of mmdet's "
                "two-stage detectors, those with an RPN and a StandardRoIHead are"
            )
        return MMDetTwoStage
    head = getattr(module, "bbox_head", None)
    if head is None or not hasattr(head, "num_classes") or not hasattr(head, "loss_by_feat"):
        raise UserError(f"{source}: a {kind} has no head for boxes that dfq knows how to use")
    return MMDetOneStage


def from_config(path: Path, checkpoint: Checkpoint | None = None) -> MMDetDetector:
    """The detector of a config, with random weights (seed 0) or those of a checkpoint.

    Raises:
        UserError: mmdet cannot build it, the checkpoint does not fit, or no adapter is for it.
    """
    config = read_config(path)
    try:
        described = prepared(plain(config["model"]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    # Now and not when the detector that is saved, or a run of it, is to be read again.
    check_spec(described, str(path))
    module = build_model(described, str(path))
    source, digest, metadata = str(path), None, None
    if checkpoint is not None:
        source, digest = str(checkpoint.path), checkpoint.sha256
        fill(module, tensors_of(checkpoint), source)
        metadata = checkpoint.root.get("meta") if isinstance(checkpoint.root, dict) else None
    kind = class_for(module, source)
    with quiet():
        names = category_names(config, metadata, _class_count(module), source)
    detector = kind(
        module,
        described,
        names,
        image_size=image_side(config, 32),
        fingerprint=digest or fingerprint(module),
        source=source,
    )
    _try(detector, str(path))
    return detector


def _try(detector: MMDetDetector, source: str) -> None:
    """Run all that dfq needs of a detector once, on a small image: better now than after hours."""
    side = detector.stride * 2
    image = torch.full((1, 3, side, side), 0.5, requires_grad=True)
    targets = Targets(torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.6, 0.6]]))
    try:
        raw = detector.raw(image)
        losses = torch.stack(list(detector.task_loss(raw, targets, (side, side)).values()))
        torch.autograd.grad(losses.sum(), image)
        with torch.no_grad():
            raw = detector.raw(image.detach())
        detector.distillation_pairs(raw, raw)
        detector.decode(raw, (side, side))
    except UserError:
        raise
    except Exception as error:
        kind = type(detector.module).__name__
        raise UserError(
            f"{source}: dfq cannot use this {kind} of mmdet ({one_line(error, 300, kind=True)})"
        ) from error


def _class_count(module: Any) -> int:
    two_stage = getattr(module, "roi_head", None) is not None
    head = module.roi_head.bbox_head if two_stage else module.bbox_head
    return int(head.num_classes)


def _stride(module: Any) -> int:
    divisor = int(getattr(module.data_preprocessor, "pad_size_divisor", 1) or 1)
    return max(32, divisor)


def metas(batch: int, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """What mmdet wants to know about images that were neither resized nor padded."""
    meta = {
        "img_shape": shape,
        "ori_shape": shape,
        "pad_shape": shape,
        "batch_input_shape": shape,
        "scale_factor": (1.0, 1.0),
    }
    return [dict(meta) for _ in range(batch)]


def scalars(losses: dict[str, Any]) -> dict[str, Tensor]:
    """mmdet's losses by name, each a scalar, summed over the levels; values that are for logs only
    are left out."""
    result = {}
    for name, value in losses.items():
        if "loss" in name:
            parts = value if isinstance(value, list | tuple) else [value]
            result[name.removeprefix("loss_")] = torch.stack([part.sum() for part in parts]).sum()
    return result


def backbone_layers(module: Any, *, whole_stages: bool) -> list[str]:
    """Parts of the backbone that have weights and give one tensor, in order of their names: blocks,
    or, of a ResNet (`layer1`, ...), whole stages if so wished."""
    backbone = module.backbone
    names: list[str] = []
    for name, part in backbone.named_children():
        full = f"backbone.{name}"
        if next(part.parameters(), None) is None or isinstance(part, nn.LayerNorm):
            continue
        if name == "stages":
            # Of a Swin; a stage as a whole gives several values.
            for path, _ in part.named_modules():
                block = path.rpartition(".")[0].endswith("blocks")
                if block or (path.endswith("downsample.reduction") and not whole_stages):
                    names.append(f"{full}.{path}")
        elif isinstance(part, nn.Sequential) and name.startswith("layer"):
            blocks = [f"{full}.{block}" for block, _ in part.named_children()]
            names += [full] if whole_stages else blocks
        elif name == "patch_embed":
            if not whole_stages:
                names.append(f"{full}.projection")
        elif isinstance(part, nn.Sequential) or (isinstance(part, nn.Conv2d) and not whole_stages):
            names.append(full)
    return names


def neck_layers(module: Any, *, inner: bool = False) -> list[str]:
    """The convolutions of a pyramid that give its outputs, and those before them if so wished."""
    neck = getattr(module, "neck", None)
    if neck is None:
        return []
    names = []
    for group in ("lateral_convs", "fpn_convs") if inner else ("fpn_convs",):
        names += [f"neck.{group}.{i}" for i in range(len(getattr(neck, group, ())))]
    return names or [f"neck.{name}" for name, part in _out_convs(neck)]


def _out_convs(neck: nn.Module) -> list[tuple[str, nn.Module]]:
    convs = getattr(neck, "out_convs", None)
    return [(f"out_convs.{i}", part) for i, part in enumerate(convs)] if convs is not None else []

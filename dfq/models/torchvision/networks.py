"""From a name and options to a network of torchvision, and from a checkpoint's tensors into it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection as zoo
from torchvision.models import get_model_weights, mobilenet_v2
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN_ResNet50_FPN_Weights
from torchvision.ops import MultiScaleRoIAlign

from ...errors import UserError, shown
from ...runtime.plain import brief, one_line
from ...runtime.suggest import suggestion
from ..bounded import bounded
from ..nn.decomposed import expose
from ..tensors import check_kinds

COCO_CLASSES = 91
"""Of torchvision's COCO weights, the background (index 0) and retired category numbers included."""


def _mobilenet_v2(
    num_classes: int,
    *,
    width: float = 1.0,
    parts: int | None = None,
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512),
    representation: int = 1024,
    **options: Any,
) -> FasterRCNN:
    """Faster R-CNN on the last map of a MobileNetV2: the network of the SPQ paper.

    Of the backbone's 19 parts the first `parts` are kept; 14 end at stride 16, which suits small
    images.
    """
    backbone = mobilenet_v2(weights=None, width_mult=width).features[:parts]
    backbone.out_channels = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)][
        -1
    ].out_channels
    network = FasterRCNN(
        backbone,
        num_classes,
        rpn_anchor_generator=AnchorGenerator((tuple(anchors),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2),
        **options,
    )
    if representation != 1024:
        inputs = network.roi_heads.box_head.fc6.in_features
        network.roi_heads.box_head.fc6 = nn.Linear(inputs, representation)
        network.roi_heads.box_head.fc7 = nn.Linear(representation, representation)
        predictor = type(network.roi_heads.box_predictor)
        network.roi_heads.box_predictor = predictor(representation, num_classes)
    return network


def _of_zoo(name: str) -> Callable[..., nn.Module]:
    def make(num_classes: int, **options: Any) -> nn.Module:
        # Without weights the layers are BatchNorm2d and not FrozenBatchNorm2d, which computes the
        # same from the same tensors but is not what folding and synthesis look for.
        return getattr(zoo, name)(
            weights=None, weights_backbone=None, num_classes=num_classes, **options
        )

    return make


MODELS: dict[str, Callable[..., nn.Module]] = {
    **{
        name: _of_zoo(name)
        for name in (
            "fasterrcnn_resnet50_fpn",
            "fasterrcnn_resnet50_fpn_v2",
            "fasterrcnn_mobilenet_v3_large_fpn",
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            "maskrcnn_resnet50_fpn",
            "maskrcnn_resnet50_fpn_v2",
            "retinanet_resnet50_fpn",
            "retinanet_resnet50_fpn_v2",
        )
    },
    "fasterrcnn_mobilenet_v2": _mobilenet_v2,
}
"""The networks by name, without the prefix `torchvision/`."""


def build(
    name: str, num_classes: int, options: Mapping[str, Any], *, epsilon: float | None = None
) -> nn.Module:
    """A network with random weights (seed 0), in eval mode, parameters frozen.

    Args:
        name: a key of `MODELS`.
        num_classes: background included.
        options: passed to its constructor.
        epsilon: of every BatchNorm; None: torchvision's own.

    Raises:
        UserError: unknown name or options.
    """
    if name not in MODELS:
        raise UserError(
            f"torchvision/{brief(name)[1:-1]}: unknown; known are {', '.join(MODELS)}"
            f"{suggestion(name, MODELS)}"
        )
    with torch.random.fork_rng(devices=[]), bounded(f"torchvision/{name}"):
        torch.manual_seed(0)
        try:
            network = MODELS[name](num_classes, **options)
        except (TypeError, ValueError, LookupError, RuntimeError, ArithmeticError) as error:
            raise UserError(f"torchvision/{name}: cannot be built ({one_line(error)})") from error
    if epsilon is not None:
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = epsilon
    expose(network)
    return network.eval().requires_grad_(False)


def coco_names() -> list[str]:
    """Names of torchvision's COCO classes from 1 on; numbers without a category are told apart."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    return [f"unused-{i}" if name == "N/A" else name for i, name in enumerate(names, start=1)]


def default_names(num_classes: int) -> list[str]:
    """Category names for a network of `num_classes`, background included."""
    if num_classes == COCO_CLASSES:
        return coco_names()
    return [f"class{index}" for index in range(num_classes - 1)]


def classes_of(name: str, tensors: Mapping[str, Tensor], source: str) -> int:
    """How many classes, background included, a state dict of the network `name` is for.

    Raises:
        UserError: it is not of this network.
    """
    if name.startswith("retinanet"):
        logits = tensors.get("head.classification_head.cls_logits.weight")
        boxes = tensors.get("head.regression_head.bbox_reg.weight")
        if logits is not None and boxes is not None and logits.ndim and boxes.ndim and len(boxes):
            return len(logits) * 4 // len(boxes)
    else:
        logits = tensors.get("roi_heads.box_predictor.cls_score.weight")
        if logits is not None and logits.ndim and len(logits):
            return len(logits)
    raise UserError(f"{source} holds no weights of torchvision's {name}: check --model")


def released_epsilon(name: str, sha256: str) -> float | None:
    """The BatchNorm constant that a released file is used with, where it is not the default.

    torchvision sets it to 0 when it loads its first COCO weights, and only then; a file of theirs
    is known by the digest in its published name.
    """
    if name not in zoo.__dict__ or name.endswith("_v2"):
        return None
    for weights in get_model_weights(name):
        digest = weights.url.rpartition("-")[2].removesuffix(".pth")
        if sha256.startswith(digest) and "resnet50" in name:
            return 0.0
    return None


def fill(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict, every tensor of it; batch counters may be missing.

    Raises:
        UserError: names or shapes do not fit.
    """
    check_kinds(network.state_dict(), tensors, source)
    try:
        missing, unknown = network.load_state_dict(dict(tensors), strict=False)
    except RuntimeError as error:
        # The first line says that it does not.
        reason = one_line(RuntimeError(str(error).partition("\n")[2] or error))
        raise UserError(f"{source} does not fit the network: {reason}") from error
    wrong = [name for name in missing if not name.endswith("num_batches_tracked")]
    if wrong or unknown:
        problem = f"{wrong[0]} is missing" if wrong else f"{shown(unknown[0])} is unknown"
        raise UserError(f"{source} does not fit the network: {problem}; check --model")


def fingerprint(network: nn.Module) -> str:
    """SHA-256 (hex) of the names and bytes of all tensors of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def letterbox_side(short: int, long: int, stride: int) -> int:
    """The side of a square that shows a 4:3 picture as large as resizing to at least `short` and at
    most `long` pixels does, to the nearest multiple of `stride`."""
    return max(stride, round(min(long, short * 4 / 3) / stride) * stride)

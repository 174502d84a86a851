"""The feature term as the paper has it: every convolution and BatchNorm, in units (its eq. 8)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..graph.execution import blank_images, hooks
from ..graph.fold_batchnorm import FoldedBatchNorm
from ..models.base import Model
from .settings import Distillation

IMAGES = 7
"""Of the pass that tells which layers are given whole images."""

SWITCHED_OFF = 1e-4
"""Size of a folded factor up to which a channel says nothing of what came before BatchNorm."""


def distilled_layers(detector: Model, settings: Distillation) -> list[str]:
    """Names of the modules whose outputs the feature term compares; none where it has no weight.

    In the relative form these are the detector's own choice; in the absolute form every convolution
    and BatchNorm, a folded one too, that a forward pass runs once, and on whole images (heads that
    all levels share run several times), of a transformer the blocks of its backbone.

    Args:
        detector: BatchNorm folded or not, quantized or not.
        settings: the `distillation` section of a recipe.
    """
    if settings.weights.feature == 0:
        return []
    names = detector.feature_layers()
    if settings.feature_form == "relative":
        return names
    if detector.attention_layers():
        backbone = detector.backbone
        return [name for name in names if backbone is None or name.startswith(f"{backbone}.")]
    calls: Counter[str] = Counter()
    whole: set[str] = set()

    def note(name: str, output: Any) -> None:
        calls[name] += 1
        if isinstance(output, Tensor) and output.ndim == 4 and len(output) == IMAGES:
            whole.add(name)

    images = blank_images(detector, detector.stride * 2).expand(IMAGES, -1, -1, -1)
    watched = hooks(
        module.register_forward_hook(lambda _m, _i, output, name=name: note(name, output))
        for name, module in detector.module.named_modules()
        if isinstance(module, (nn.Conv2d, _BatchNorm, FoldedBatchNorm))
    )
    # With gradients, as in training: a second stage then waits for the teacher's proposals.
    with watched, torch.enable_grad():
        detector.raw(images.clone())
    return [name for name, count in calls.items() if count == 1 and name in whole]


def absolute_distance(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], module: nn.Module
) -> Tensor:
    """Mean over the layers of the mean of (S - T)^2.

    Where BatchNorm is folded, a convolution gives what BatchNorm gave. What went into that is
    1 / factor as far apart, channel by channel, and counts under the name of the folded BatchNorm.

    Args:
        student, teacher: layer name -> features of one shape, `(n, c, ...)`.
        module: the network that the names are of.
    """
    terms = []
    for name, target in teacher.items():
        square = (student[name] - target).square()
        layer = module.get_submodule(name)
        if isinstance(layer, FoldedBatchNorm):
            size = layer.factor.abs()
            weight = torch.where(size > SWITCHED_OFF, size.clamp_min(SWITCHED_OFF) ** -2, 0.0)
            square = square * weight.view(-1, *[1] * (square.ndim - 2))
        terms.append(square.mean())
    return torch.stack(terms).mean()

"""A YOLOv5 small enough to train in a test, with BatchNorm statistics as training leaves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfq.models.yolov5.detector import YOLOv5

SIDE = 64

DESCRIPTION: dict[str, Any] = {
    "nc": 3,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30], [30, 61, 62, 45]],
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C3", [16]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "SPPF", [32, 3]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 1, "C3", [16, False]],
        [[8, 5], 1, "Detect", ["nc", "anchors"]],
    ],
}


def blobs(count: int, seed: int = 0) -> Tensor:
    """Smooth random images `(count, 3, SIDE, SIDE)` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")


def tiny_detector(seed: int = 0) -> YOLOv5:
    """Two levels (strides 8 and 16), three categories, about 25,000 weights.

    Every BatchNorm has a random affine part, and the statistics of `blobs` seen through it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        detector = YOLOv5.from_yaml(DESCRIPTION, names=["a", "b", "c"], image_size=SIDE)
    norms = [m for m in detector.module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data.copy_(0.6 + torch.rand(norm.num_features, generator=generator))
        norm.bias.data.copy_(0.5 * torch.randn(norm.num_features, generator=generator))
        norm.momentum = 1.0
    detector.module.train()
    with torch.no_grad():
        detector.raw(blobs(16, seed))
    detector.module.eval()
    return detector


def stacked(raw: list[Tensor]) -> Tensor:
    """All raw predictions of a batch as `(n, values)`, to look at."""
    return torch.cat([level.flatten(1) for level in raw], dim=1).detach()

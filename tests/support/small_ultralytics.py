"""A small network of Ultralytics, and checkpoints of it as its training writes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel

NAMES = {0: "ball", 1: "ring"}

YAML: dict[str, Any] = {
    "nc": 2,
    "scales": {"n": [0.5, 0.25, 1024]},
    "backbone": [
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "C2f", [64, True]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "SPPF", [64, 5]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [-1, 1, "C2f", [64]],
        [[7, 4], 1, "Detect", ["nc"]],
    ],
}


def yaml_with(**changes: Any) -> dict[str, Any]:
    """`YAML` with other values; None takes a key away."""
    changed = {**copy.deepcopy(YAML), **changes}
    return {key: value for key, value in changed.items() if value is not None}


def network(activation: nn.Module | None = None, **changes: Any) -> Any:
    """The network, with statistics as training leaves them.

    Args:
        activation: what `Conv.default_act` was set to in code; None: nothing.
        changes: of `YAML`.
    """
    before = Conv.default_act
    try:
        if activation is not None:
            Conv.default_act = activation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = DetectionModel(yaml_with(**changes), verbose=False)
    finally:
        Conv.default_act = before
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    model.names = dict(NAMES)
    model.args = {"imgsz": 64}
    # Ultralytics' convolutions share one activation with all others of the process.
    return copy.deepcopy(model).eval()


def save(model: Any, path: Path, **more: Any) -> Path:
    torch.save({"model": model, **more}, path)
    return path


def raw_of(model: Any, images: torch.Tensor) -> torch.Tensor:
    """What a network of Ultralytics predicts before decoding, all in one row an image."""
    with torch.no_grad():
        raw = model(images)[1]
        return torch.cat([raw["boxes"], raw["scores"]], dim=1).flatten(1)


def raw_of_detector(detector: Any, images: torch.Tensor) -> torch.Tensor:
    """The same of a detector that was loaded."""
    with torch.no_grad():
        branch = detector.raw(images).one2many
        return torch.cat([branch.boxes, branch.scores], dim=1).flatten(1)

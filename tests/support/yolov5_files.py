"""Checkpoints of the original YOLOv5, written without its code.

A pickle holds the names of classes, not the classes: stand-ins under the names of the original's
modules write the same files, and read them.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfq.models.yolov5 import network as yolov5_network
from support.tiny_detector import DESCRIPTION, tiny_detector

PLACES = {
    "models.common": (
        *("Conv", "Focus", "Bottleneck", "C3", "SPP", "SPPF", "Concat"),
        *("AutoShape", "DetectMultiBackend"),
    ),
    "models.yolo": ("Detect", "Model", "DetectionModel"),
}


@contextmanager
def classes(package: str = "") -> Iterator[dict[str, type[nn.Module]]]:
    """Stand-ins for the original's classes, importable within this context.

    Args:
        package: what its modules lie in: "" (its repository) or "yolov5." (the package of pip).
    """
    made: dict[str, type[nn.Module]] = {}
    modules: dict[str, types.ModuleType] = {}
    for place, names in PLACES.items():
        full = f"{package}{place}"
        parts = full.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            modules.setdefault(name, types.ModuleType(name))
        for name in names:
            kind = type(name, (nn.Module,), {"__module__": full})
            made[name] = kind
            setattr(modules[full], name, kind)
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield made
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def dressed(module: nn.Module, made: dict[str, type[nn.Module]]) -> Any:
    """A copy of a network of ours in the original's classes."""
    network = copy.deepcopy(module)
    for part in network.modules():
        kind = "Model" if isinstance(part, yolov5_network.YOLOv5Network) else type(part).__name__
        if kind in made and type(part).__module__.startswith("dfq."):
            part.__class__ = made[kind]
            for name in ("strides", "outputs", "sources", "_needed"):
                vars(part).pop(name, None)
    return network


def tiny(made: dict[str, type[nn.Module]]) -> Any:
    """`tiny_detector` as the original's training would keep it."""
    model = dressed(tiny_detector().module, made)
    model.yaml = copy.deepcopy(DESCRIPTION)
    model.names = ["a", "b", "c"]
    model.model[-1].stride = torch.tensor([8.0, 16.0])
    model.model[-1].nc = 3
    return model


def write(path: Path, change: Any = None, *, package: str = "", **more: Any) -> Path:
    """A checkpoint of `tiny`, float32.

    Args:
        path: the file.
        change: called with the model and the stand-ins; what it returns, if anything, is kept in
            the model's place.
        package: as for `classes`.
        more: kept beside the model.
    """
    with classes(package) as made:
        model = tiny(made)
        wrapped = change(model, made) if change is not None else None
        torch.save({"ema": None, "model": wrapped if wrapped is not None else model, **more}, path)
    return path


def rewrite(source: Path, path: Path, change: Any, *, package: str = "") -> Path:
    """A real checkpoint with its model changed, under the names of a package."""
    with classes() as made:
        root = torch.load(source, map_location="cpu", weights_only=False)
    with classes(package) as named:
        model = root["ema"] if root.get("ema") is not None else root["model"]
        for part in model.modules():
            if type(part).__name__ in made and type(part).__module__.startswith("models."):
                part.__class__ = named[type(part).__name__]
        wrapped = change(model, named)
        torch.save({"ema": None, "model": wrapped if wrapped is not None else model}, path)
    return path

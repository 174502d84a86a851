"""Small two-stage networks as the command line names them, and scenes that they are measured on."""

from __future__ import annotations

from pathlib import Path

import torch

from dfq.demo.scenes import write_coco
from dfq.models import load_detector, save_detector
from dfq.models.torchvision.base import from_name
from support.small_mmdet import enliven, write_config
from support.torchvision_cli_parts import write_scenes


def write_torchvision(place: Path) -> tuple[str | Path, ...]:
    """A Faster R-CNN on MobileNetV2 and `scenes`; the words that name it."""
    options = {
        "width": 0.35, "parts": 14, "representation": 32, "anchors": [16, 32], "min_size": 64,
        "max_size": 64, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16,
    }  # fmt: skip
    save_detector(from_name("fasterrcnn_mobilenet_v2", options=options), place / "m.safetensors")
    write_scenes(place / "scenes", load_detector(place / "m.safetensors").names)
    return ("--model", place / "m.safetensors")


def write_mmdet(place: Path, network: str) -> tuple[str | Path, ...]:
    """A network of mmdet and `scenes`; the words that name it."""
    config = write_config(place, network)
    detector = enliven(load_detector(config))
    torch.save({"meta": {}, "state_dict": detector.module.state_dict()}, place / "w.pth")
    write_coco(place / "scenes", 2, 64)
    if network == "retinanet":
        write_scenes(place / "named", detector.names)
        (place / "scenes" / "annotations.json").write_text(
            (place / "named" / "annotations.json").read_text()
        )
    return ("--model", config, "--checkpoint", place / "w.pth")

"""What the demo runs on: a small trained detector, and the scenes it is measured on."""

from __future__ import annotations

from pathlib import Path

from .scenes import NAMES, draw_scene, write_coco

__all__ = ["NAMES", "demo_weights", "draw_scene", "write_coco"]


def demo_weights() -> Path:
    """The demo detector: a safetensors file of fp16 weights, BatchNorm statistics included.

    Its header holds under `dfq` the JSON description the network is rebuilt from: `family`,
    `yaml` (the model's structure), `names`, `image_size`, `stride`, `task`.
    `scripts/train_demo_detector.py` made it.
    """
    return Path(__file__).with_name("detector.safetensors")

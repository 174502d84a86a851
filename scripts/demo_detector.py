"""The demo detector: its structure, its file, and how well it detects.

A narrow YOLO11 on procedurally drawn scenes; scripts/train_demo_detector.py trains it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch
import ultralytics
import yaml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors import safe_open
from safetensors.torch import save_file
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.nms import non_max_suppression

from dfq.demo import NAMES
from dfq.demo.scenes import Scene, coco_annotations, draw_scene

IMAGE_SIZE = 160
STRIDE = 32
SCALE = (0.50, 0.1875, 1024)
"""Depth, width and largest channel count: YOLO11n's, three quarters as wide."""


def architecture() -> dict[str, Any]:
    """The structure of YOLO11 from ultralytics' own file, at `SCALE` and with our categories."""
    path = Path(ultralytics.__file__).parent / "cfg" / "models" / "11" / "yolo11.yaml"
    structure = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {**structure, "nc": len(NAMES), "scales": {"demo": list(SCALE)}, "scale": "demo"}


def ship(model: DetectionModel, path: Path) -> None:
    """Write `model`, unfused, with what rebuilds it: kernels in fp16, vectors in fp32.

    The vectors hold the BatchNorm statistics, which synthesis inverts; they are one per cent of
    the file, and a small variance would not survive fp16.
    """
    tensors = {
        name: (tensor.half() if tensor.ndim > 1 else tensor).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    spec = {
        "family": "ultralytics",
        "task": "detect",
        "yaml": architecture(),
        "names": list(NAMES),
        "image_size": IMAGE_SIZE,
        "stride": STRIDE,
        "fingerprint": digest.hexdigest(),
        "source": "demo",
    }
    save_file(tensors, path, metadata={"dfq": json.dumps(spec)})
    path.chmod(0o644)  # safetensors writes for its owner's eyes only


def rebuild(path: Path) -> DetectionModel:
    """The network of a file that `ship` wrote, in fp32 and eval mode."""
    with safe_open(path, "pt") as file:
        spec = json.loads(file.metadata()["dfq"])
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    model = DetectionModel(spec["yaml"], verbose=False)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise click.ClickException(
            f"{path} does not fit its own description: {missing} {unexpected}"
        )
    return model.eval()


@torch.no_grad()
def evaluate(model: DetectionModel, first_seed: int, count: int) -> tuple[float, float]:
    """COCO AP@[.50:.95] and AP@.50 of `model` on the scenes of `count` seeds from `first_seed`."""
    model.eval()
    scenes = [draw(first_seed + index) for index in range(count)]
    results: list[dict[str, Any]] = []
    for start in range(0, count, 32):
        images = np.stack([scene.image for scene in scenes[start : start + 32]])
        inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0
        found = non_max_suppression(model(inputs)[0], conf_thres=0.001, iou_thres=0.6)
        for index, detections in enumerate(found, start=start + 1):
            for x1, y1, x2, y2, score, label in detections.tolist():
                row = {"image_id": index, "category_id": int(label) + 1, "score": score}
                results.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    if not results:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco_annotations(scenes)
        truth.createIndex()
        measured = COCOeval(truth, truth.loadRes(results), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return float(measured.stats[0]), float(measured.stats[1])


def draw(seed: int) -> Scene:
    """The scene of a seed, `IMAGE_SIZE` pixels wide and high."""
    cv2.setNumThreads(1)
    return draw_scene(seed, IMAGE_SIZE)

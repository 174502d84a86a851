"""Small two-stage detectors trained on procedurally drawn scenes, to measure the method on.

    python -m scripts.train_demo_detector --family mask-rcnn-resnet \\
      --work build/mask-rcnn-resnet --output build/mask-rcnn-resnet.safetensors

They take boxes and masks from the scenes, in memory, and learn by their framework's own losses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from dfq.demo.scenes import NAMES, TRAINING_SEED_START, draw_scene
from dfq.models import Detector, from_spec, require_detector, save_detector
from dfq.models.mmdet.config import plain, prepared, read_config, shipped_config

SIDE = 128
_COMMON = {"names": list(NAMES), "image_size": SIDE, "stride": 32, "fingerprint": "", "source": ""}


def _mask_rcnn(backbone: dict[str, Any], channels: list[int]) -> dict[str, Any]:
    """mmdet's Mask R-CNN on another backbone, an eighth to a fourth as wide."""
    path = shipped_config("mask-rcnn_r50_fpn_1x_coco")
    assert path is not None
    model: Any = plain(read_config(path)["model"])
    model["backbone"] = backbone
    model["neck"] |= {"in_channels": channels, "out_channels": 64}
    model["rpn_head"] |= {"in_channels": 64, "feat_channels": 64}
    # Objects are 10 to 100 pixels long.
    model["rpn_head"]["anchor_generator"]["scales"] = [4]
    head = model["roi_head"]
    for extractor in ("bbox_roi_extractor", "mask_roi_extractor"):
        # Below 16 pixels the finest level, then one level up each time the side doubles.
        head[extractor] |= {"out_channels": 64, "finest_scale": 16}
    head["bbox_head"] |= {"in_channels": 64, "fc_out_channels": 256, "num_classes": len(NAMES)}
    head["mask_head"] |= {
        "in_channels": 64, "conv_out_channels": 64, "num_convs": 2, "num_classes": len(NAMES)
    }  # fmt: skip
    model["train_cfg"]["rcnn"]["sampler"]["num"] = 32
    model["train_cfg"]["rpn_proposal"] |= {"nms_pre": 200, "max_per_img": 100}
    model["test_cfg"]["rpn"] |= {"nms_pre": 300, "max_per_img": 100}
    return {**_COMMON, "family": "mmdet", "config": prepared(model)}


def _resnet() -> dict[str, Any]:
    backbone = {
        "type": "ResNet",
        "depth": 18,
        "base_channels": 16,
        "stem_channels": 16,
        "num_stages": 4,
        "out_indices": [0, 1, 2, 3],
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "norm_eval": False,
        "style": "pytorch",
    }
    return _mask_rcnn(backbone, [16, 32, 64, 128])


def _swin() -> dict[str, Any]:
    backbone = {
        "type": "SwinTransformer",
        "embed_dims": 32,
        "depths": [2, 2, 2, 2],
        "num_heads": [1, 2, 4, 8],
        "window_size": 4,
        "drop_path_rate": 0.0,
        "out_indices": [0, 1, 2, 3],
    }
    return _mask_rcnn(backbone, [32, 64, 128, 256])


def _mobilenet() -> dict[str, Any]:
    options = {
        "width": 0.5,
        "parts": 14,
        "representation": 256,
        "anchors": [12, 24, 48, 96],
        "min_size": SIDE,
        "max_size": SIDE,
        "rpn_post_nms_top_n_test": 100,
        "box_batch_size_per_image": 64,
    }
    network = {"network": "fasterrcnn_mobilenet_v2", "options": options, "epsilon": None}
    return {**_COMMON, "family": "torchvision", **network}


FAMILIES: dict[str, Callable[[], dict[str, Any]]] = {
    "mask-rcnn-resnet": _resnet,
    "mask-rcnn-swin": _swin,
    "faster-rcnn-mobilenetv2": _mobilenet,
}
"""Description (see `Detector.spec`) of each network that can be trained."""

Labelled = tuple[Tensor, Tensor, Tensor, Tensor]
"""Image uint8 `(3, S, S)`, boxes `(n, 4)`, labels `(n,)`, masks bool `(n, S, S)`."""


def draw(count: int) -> list[Labelled]:
    """The first `count` scenes for training."""
    scenes = (draw_scene(TRAINING_SEED_START + index, SIDE) for index in range(count))
    return [
        (
            torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(),
            torch.from_numpy(scene.boxes),
            torch.from_numpy(scene.labels),
            torch.from_numpy(scene.masks),
        )
        for scene in scenes
    ]


def batches(scenes: list[Labelled], size: int, epoch: int) -> Iterator[list[Labelled]]:
    """One shuffled pass, half of the images mirrored."""
    generator = torch.Generator().manual_seed(epoch)
    order = torch.randperm(len(scenes), generator=generator).tolist()
    for start in range(0, len(order) - size + 1, size):
        batch = []
        for index in order[start : start + size]:
            image, boxes, labels, masks = scenes[index]
            if float(torch.rand((), generator=generator)) < 0.5:
                image, masks = image.flip(2), masks.flip(2)
                boxes = torch.stack(
                    [SIDE - boxes[:, 2], boxes[:, 1], SIDE - boxes[:, 0], boxes[:, 3]], dim=1
                )
            batch.append((image, boxes, labels, masks))
        yield batch


def _losses(detector: Detector, batch: list[Labelled]) -> Tensor:
    """The framework's own training loss, with real masks."""
    images = torch.stack([image for image, *_ in batch]).float() / 255
    if detector.family == "torchvision":
        targets = [
            {"boxes": boxes, "labels": labels + 1, "masks": masks.to(torch.uint8)}
            for _, boxes, labels, masks in batch
        ]
        return torch.stack(list(detector.module([*images], targets).values())).sum()
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    from dfq.models.mmdet.base import metas, scalars

    samples = []
    for meta, (_, boxes, labels, masks) in zip(metas(len(batch), (SIDE, SIDE)), batch, strict=True):
        sample = DetDataSample(metainfo=meta)
        bitmaps = BitmapMasks(masks.numpy().astype(np.uint8), SIDE, SIDE)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=bitmaps)
        sample.ignored_instances = InstanceData(
            bboxes=boxes.new_zeros(0, 4), labels=labels.new_zeros(0)
        )
        samples.append(sample)
    losses = detector.module.loss(detector.normalize(images), samples)
    return torch.stack(list(scalars(losses).values())).sum()


def train_rcnn(
    family: str,
    work: Path,
    output: Path,
    *,
    scenes: int,
    epochs: int,
    batch: int,
    learning_rate: float,
) -> Detector:
    """Train a network of `FAMILIES`, or go on from the last epoch in `work`, and save it.

    Args:
        family: a key of `FAMILIES`.
        work: folder of the checkpoint.
        output: the `.safetensors` file.
        scenes, epochs, batch, learning_rate: AdamW's rate, warm-up then cosine.
    """
    work.mkdir(parents=True, exist_ok=True)
    detector = require_detector(from_spec({**FAMILIES[family](), "source": family}))
    module = detector.module.requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.02)
    checkpoint, first = work / "checkpoint.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    began = time.monotonic()
    data = draw(scenes)
    steps = scenes // batch
    click.echo(f"drew {scenes} scenes in {time.monotonic() - began:.0f} s")
    for epoch in range(first, epochs):
        module.train()
        total = 0.0
        torch.manual_seed(epoch)  # Anchors and proposals are sampled.
        for index, chosen in enumerate(batches(data, batch, epoch)):
            step = epoch * steps + index
            rise = min(1.0, (step + 1) / 200)
            rate = 0.5 * (1 + math.cos(math.pi * step / (epochs * steps)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rise * rate
            loss = _losses(detector, chosen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 10.0)
            optimizer.step()
            total += float(loss.detach())
        state = {
            "model": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        click.echo(
            f"epoch {epoch + 1}/{epochs}  {time.monotonic() - began:.0f} s  "
            f"loss {total / max(1, steps):.3f}"
        )
    module.eval().requires_grad_(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_detector(detector, output)
    return detector

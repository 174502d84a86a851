"""Small sets to calibrate on, whose brightest value is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfq.data.calibration_set import CalibrationSet
from dfq.data.calibration_writer import CalibrationWriter

BRIGHTEST = (104, 124, 144, 164, 184, 204)
"""Largest value of each image of the set."""

COUNT, SIDE = len(BRIGHTEST), 64


def make_set(folder: Path) -> CalibrationSet:
    """A calibration set of noise, in which each image is brighter than the one before it."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(COUNT, 3, SIDE, SIDE, generator=draw)
    scale = torch.tensor(BRIGHTEST) / noise.amax(dim=(1, 2, 3))
    images = (noise * scale[:, None, None, None]).round().to(torch.uint8)
    labels = [torch.tensor([[1.0, 0.5, 0.5, 0.4, 0.3]]) for _ in range(COUNT)]
    writer = CalibrationWriter(folder, {"seed": 0}, ["cat", "dog"], 1)
    writer.append(0, 0, images, labels, [torch.ones(1)] * COUNT)
    return writer.finish({})


def photos(folder: Path, count: int = 3) -> Path:
    """A folder of bare images of several shapes."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for index in range(count):
        pixels = draw.integers(0, 256, (40 + 30 * index, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def real_set(folder: Path) -> Path:
    """A COCO set of two images of 40 x 20 pixels, with one dog each, of 20 x 10 pixels."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for index in range(2):
        pixels = draw.integers(0, 256, (20, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 20} for i in range(2)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i,
                "category_id": 8,
                "iscrowd": 0,
                "bbox": [10, 0, 20, 10],
                "area": 200,
            }
            for i in range(2)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder

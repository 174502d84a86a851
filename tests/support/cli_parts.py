"""What several tests take: of `test_cli` and others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def real_set(folder: Path, count: int = 4, names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """A COCO set of noise, one object an image."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for index in range(count):
        pixels = draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    document = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(count)
        ],
        "annotations": [
            {
                "id": i + 1, "image_id": i, "category_id": 1 + i % len(names), "iscrowd": 0,
                "bbox": [8, 8, 30, 24], "area": 720,
            }
            for i in range(count)
        ],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
    }  # fmt: skip
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder

"""What several tests take: of `test_torchvision_cli` and others."""

from __future__ import annotations

import json
from pathlib import Path

from dfq.demo.scenes import write_coco


def write_scenes(folder: Path, names: list[str]) -> None:
    """Two scenes under the categories of the detector."""
    file = write_coco(folder, 2, 64)
    record = json.loads(file.read_text())
    for category, name in zip(record["categories"], names, strict=False):
        category["name"] = name
    file.write_text(json.dumps(record))

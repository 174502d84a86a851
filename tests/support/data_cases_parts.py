"""What several tests take: of `test_data_cases` and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def small(place: Path, row: str) -> Path:
    """A YOLO set of one image with one label."""
    (place / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(place / "images" / "a.png")
    (place / "labels").mkdir()
    (place / "labels" / "a.txt").write_text(row)
    (place / "data.yaml").write_text("val: images\nnames: [a, b, c]\n")
    return place / "data.yaml"


def small_coco(place: Path, **changes: Any) -> Path:
    (place / "images").mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(place / "images" / "a.png")
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 24, 24], "area": 576}
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "annotations": [{**row, **changes.pop("annotation", {})}],
        "categories": [{"id": 1, "name": "a"}],
    }
    for key, value in changes.items():
        document[key][0].update(value)
    (place / "annotations.json").write_text(json.dumps(document))
    return place


def small_voc(place: Path, xml: bytes) -> Path:
    for name in ("Annotations", "JPEGImages"):
        (place / name).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(place / "JPEGImages" / "a.jpg")
    (place / "Annotations" / "a.xml").write_bytes(xml)
    return place


def corners(*values: object) -> bytes:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), values, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return (
        f"<annotation><object><name>a</name><bndbox>{box}</bndbox></object></annotation>"
    ).encode()

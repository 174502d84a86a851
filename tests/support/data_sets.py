"""Eight real images as sets of every format, small enough to measure in a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

IMAGES = (139, 632, 776, 802, 885, 1268, 1353, 1490)
"""COCO's ids of the images that the reference values are of."""

COCO_AP, BOX_AP = 0.2872, 0.2850
"""AP of a COCO-trained YOLOv5n on them at 320 px: by COCO's areas and crowd flags, and without
(what YOLO and VOC files hold). pycocotools gives the former for the same detections."""


class Eight:
    """The images and what is in them; `folder` is a real COCO set that has them."""

    def __init__(self, folder: Path) -> None:
        document = json.loads((folder / "annotations.json").read_text())
        self.folder = folder / "images"
        self.categories: list[dict[str, Any]] = document["categories"]
        self.images = [row for row in document["images"] if row["id"] in IMAGES]
        self.annotations = [row for row in document["annotations"] if row["image_id"] in IMAGES]
        assert len(self.images) == len(IMAGES)

    def document(self) -> dict[str, Any]:
        """A COCO document, to be changed."""
        keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        return {
            "images": [
                {key: row[key] for key in ("id", "file_name", "width", "height")}
                for row in self.images
            ],
            "annotations": [{key: row[key] for key in keys} for row in self.annotations],
            "categories": [{"id": row["id"], "name": row["name"]} for row in self.categories],
        }

    def copy_images(self, folder: Path, rename: dict[str, str] | None = None) -> None:
        """The image files, under other names where `rename` gives a stem another."""
        folder.mkdir(parents=True, exist_ok=True)
        for row in self.images:
            name = Path(row["file_name"])
            target = folder / f"{(rename or {}).get(name.stem, name.stem)}{name.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, target)

    def coco(self, place: Path, document: dict[str, Any] | None = None) -> Path:
        """A COCO set; returns its folder."""
        self.copy_images(place / "images")
        text = json.dumps(document or self.document())
        (place / "annotations.json").write_text(text)
        return place

    def label_lines(self, image_id: int) -> list[str]:
        """An image's labels as YOLO has them."""
        index = {row["id"]: number for number, row in enumerate(self.categories)}
        (image,) = (row for row in self.images if row["id"] == image_id)
        lines = []
        for row in self.annotations:
            if row["image_id"] == image_id:
                x, y, w, h = row["bbox"]
                values = (
                    (x + w / 2) / image["width"],
                    (y + h / 2) / image["height"],
                    w / image["width"],
                    h / image["height"],
                )
                numbers = " ".join(f"{value:.8f}" for value in values)
                lines.append(f"{index[row['category_id']]} {numbers}")
        return lines

    def yolo(self, place: Path, header: str = "val: images/val\n", more: str = "") -> Path:
        """A YOLO set; `more` follows every label. Returns the YAML file."""
        self.copy_images(place / "images" / "val")
        (place / "labels" / "val").mkdir(parents=True)
        for row in self.images:
            lines = [f"{line}{more}\n" for line in self.label_lines(row["id"])]
            label = (place / "labels" / "val" / row["file_name"]).with_suffix(".txt")
            label.write_text("".join(lines))
        names = json.dumps([row["name"] for row in self.categories])
        (place / "data.yaml").write_text(f"{header}names: {names}\n")
        return place / "data.yaml"

    def xml(self, image_id: int) -> str:
        """An image's annotation as VOC has it, without a declaration."""
        name = {row["id"]: row["name"] for row in self.categories}
        (image,) = (row for row in self.images if row["id"] == image_id)
        objects = "".join(
            f"<object><name>{name[row['category_id']]}</name><difficult>0</difficult><bndbox>"
            f"<xmin>{x + 1:.4f}</xmin><ymin>{y + 1:.4f}</ymin>"
            f"<xmax>{x + w:.4f}</xmax><ymax>{y + h:.4f}</ymax></bndbox></object>"
            for row in self.annotations
            if row["image_id"] == image_id
            for x, y, w, h in [row["bbox"]]
        )
        size = f"<width>{image['width']}</width><height>{image['height']}</height>"
        return (
            f"<annotation><filename>{image['file_name']}</filename>"
            f"<size>{size}<depth>3</depth></size>{objects}</annotation>"
        )

    def voc(
        self,
        place: Path,
        annotations: str = "Annotations",
        images: str = "JPEGImages",
        stems: dict[str, str] | None = None,
    ) -> Path:
        """A VOC set with its parts in folders of those names; returns its folder."""
        self.copy_images(place / images, stems)
        for row in self.images:
            stem = Path(row["file_name"]).stem
            file = place / annotations / f"{(stems or {}).get(stem, stem)}.xml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.xml(row["id"]))
        return place

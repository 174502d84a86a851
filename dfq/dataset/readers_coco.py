"""Reader for COCO's instances format (one JSON file)."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from .image_set import ImageSet, Item, Segment, image_size, make_item, read_text, require_images


def read_coco(path: Path) -> ImageSet:
    """Read a COCO instances file; its images lie beside it, in `images/`, or as COCO keeps them.

    Annotations with `iscrowd` are kept and ignored. A box is `x, y, width, height` in pixels.

    Raises:
        UserError: broken JSON, a missing part, a missing image, an id that does not exist.
    """
    data = _load(path)
    categories = _by_id(path, data, "categories")
    images = _by_id(path, data, "images")
    index_of = {category_id: index for index, category_id in enumerate(categories)}
    annotations = _group(path, data, images, index_of)
    files = _locate(path, images)

    items: list[Item] = []
    dropped = 0
    for image_id, image in images.items():
        rows = annotations[image_id]
        item, lost = make_item(
            files[image_id],
            _size(path, image, files[image_id]),
            image_id,
            [(x, y, x + w, y + h) for x, y, w, h in (row["bbox"] for row in rows)],
            [index_of[row["category_id"]] for row in rows],
            [bool(row.get("iscrowd", 0)) for row in rows],
            [row.get("area") for row in rows],
            [_segment(path, row) for row in rows],
        )
        items.append(item)
        dropped += lost
    return ImageSet(path, [str(c["name"]) for c in categories.values()], items, dropped=dropped)


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: broken JSON: nested too deeply") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not in COCO instances format: the top level is no object")
    for part in ("images", "categories", "annotations"):
        rows = data.get(part)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path}: not in COCO instances format: it has no list {part!r}")
    return data


def _by_id(path: Path, data: dict[str, Any], part: str) -> dict[int, dict[str, Any]]:
    """The rows of a list by their ids, in file order."""
    field = "name" if part == "categories" else "file_name"
    rows: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(data[part]):
        identity = row.get("id")
        if not isinstance(identity, int) or not isinstance(row.get(field), str):
            raise UserError(f"{path}: {part}[{number}] has no whole number 'id' or no {field!r}")
        if identity in rows:
            raise UserError(f"{path}: {part}[{number}] repeats the id {identity}")
        rows[identity] = row
    return rows


def _group(
    path: Path, data: dict[str, Any], images: dict[int, Any], categories: dict[int, int]
) -> defaultdict[int, list[dict[str, Any]]]:
    """Checked annotations by image id."""
    grouped: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for number, row in enumerate(data["annotations"]):
        where = f"{path}: annotations[{number}] (id {row.get('id')})"
        for key, known, part in (
            ("image_id", images, "images"),
            ("category_id", categories, "categories"),
        ):
            identity = row.get(key)
            if not isinstance(identity, int) or identity not in known:
                raise UserError(f"{where} has {key} {identity!r}, which is not in {part!r}")
        box = row.get("bbox")
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(isinstance(value, (int, float)) for value in box)
        ):
            raise UserError(f"{where} has no 'bbox' of four numbers (x, y, width, height)")
        if not isinstance(row.get("area"), (int, float, type(None))):
            raise UserError(f"{where} has an 'area' that is no number: {row['area']!r}")
        grouped[row["image_id"]].append(row)
    return grouped


def _segment(path: Path, row: dict[str, Any]) -> Segment | None:
    """The outline of an object, checked; None where there is none (some tools write `[]`)."""
    given = row.get("segmentation")
    if not given:
        return None
    if isinstance(given, dict):
        size, counts = given.get("size"), given.get("counts")
        whole = isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size)
        if whole and isinstance(counts, str | list):
            return given
    elif isinstance(given, list) and all(_is_polygon(part) for part in given):
        # Fewer than three corners enclose nothing, and pycocotools takes four numbers for a box.
        return [part for part in given if len(part) >= 6] or None
    raise UserError(
        f"{path}: the annotation with id {row.get('id')} has a 'segmentation' that is neither a "
        "list of polygons x1 y1 x2 y2 ... nor run lengths with 'size' and 'counts'"
    )


def _is_polygon(part: Any) -> bool:
    numbers = isinstance(part, list) and all(isinstance(n, int | float) for n in part)
    return numbers and len(part) % 2 == 0


def _locate(path: Path, images: dict[int, dict[str, Any]]) -> dict[int, Path]:
    folders = [path.parent / "images", path.parent]
    if path.parent.name == "annotations":
        # COCO itself: annotations/instances_val2017.json beside val2017/ or images/val2017/.
        root, split = path.parent.parent, path.stem.rpartition("_")[2]
        folders += [root / split, root / "images" / split, root / "images"]
    found: dict[int, Path] = {}
    for image_id, image in images.items():
        name = image["file_name"].replace("\\", "/")
        candidates = [folder / name for folder in folders]
        found[image_id] = next((file for file in candidates if file.is_file()), candidates[0])
        # The folder that held one image most likely holds the next: try it first.
        if found[image_id].is_file():
            hit = folders[candidates.index(found[image_id])]
            folders = [hit, *(folder for folder in folders if folder != hit)]
    require_images(path, list(found.values()))
    return found


def _size(path: Path, image: dict[str, Any], file: Path) -> tuple[int, int]:
    width, height = image.get("width"), image.get("height")
    if width is None or height is None:
        return image_size(file)
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        raise UserError(
            f"{path}: image {image['file_name']!r} has an impossible size, {width!r} x {height!r}"
        )
    return width, height

"""Reader for YOLO sets: a `data.yaml`, images, and one label text file an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..errors import UserError
from .image_set import (
    ImageSet,
    Item,
    image_files,
    image_size,
    make_item,
    read_text,
    require_images,
)

_TOLERANCE = 0.01
"""How far a normalised coordinate may lie outside [0, 1]: label tools round."""


def read_yolo(path: Path, split: str | None = None) -> ImageSet:
    """Read a YOLO set as Ultralytics resolves it.

    `path` of the YAML is relative to the YAML's folder; `train`, `val` and `test` are relative to
    `path`, each a folder, a text file that lists images, or a list of these. The labels of
    `.../images/a.jpg` are in `.../labels/a.txt`: lines of category, centre x, centre y, width,
    height, normalised; or category and the corners of a polygon, whose bounds become the box. An
    image without a label file holds no objects; a split without any label file is unlabelled.

    Args:
        path: the YAML file.
        split: `val`, `train` or `test`; by default `val`, else `train`.

    Raises:
        UserError: broken YAML, a missing split or image, a label line that makes no sense.
    """
    data = _load(path)
    root = _root(path, data)
    entries = _split(path, data, split)
    images = [file for entry in entries for file in _images(path, root, entry)]
    require_images(path, images)
    labels = [_label_path(image) for image in images]
    rows = [_read_labels(label) if label.is_file() else [] for label in labels]
    names = _names(path, data, rows)

    items: list[Item] = []
    dropped = 0
    for image_id, (image, label, objects) in enumerate(zip(images, labels, rows, strict=True), 1):
        _check_categories(label, objects, len(names))
        width, height = image_size(image)
        unique = list(dict.fromkeys((category, box) for _, category, box in objects))
        scale = np.array([width, height, width, height])
        item, lost = make_item(
            image,
            (width, height),
            image_id,
            [np.array(box) * scale for _, box in unique],
            [category for category, _ in unique],
        )
        items.append(item)
        dropped += lost + len(objects) - len(unique)
    labelled = any(label.is_file() for label in labels)
    return ImageSet(path, names, items, labelled=labelled, dropped=dropped)


def _load(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}{line}: broken YAML: {problem}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a YOLO data file: no keys such as 'val' and 'names'")
    return data


def _root(path: Path, data: dict[str, Any]) -> Path:
    given = data.get("path")
    if given in (None, ""):
        return path.parent
    candidates = [path.parent / str(given), Path(str(given))]
    root = next((folder for folder in candidates if folder.is_dir()), None)
    if root is None:
        raise UserError(f"{path}: its 'path' does not exist: {candidates[0]}")
    return root


def _split(path: Path, data: dict[str, Any], split: str | None) -> list[str]:
    wanted = [split] if split is not None else ["val", "train"]
    name = next((key for key in wanted if data.get(key)), None)
    if name is None:
        known = ", ".join(key for key in ("train", "val", "test") if data.get(key)) or "none"
        raise UserError(f"{path}: has no split {' or '.join(map(repr, wanted))}; it has: {known}")
    value = data[name]
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path}: {name!r} must be a folder, a .txt file or a list of these")
    return entries


def _images(path: Path, root: Path, entry: str) -> list[Path]:
    """The image files of one entry of a split."""
    place = root / entry
    if not place.exists() and entry.startswith("../"):
        # Roboflow writes "../valid/images" for a folder beside the YAML; Ultralytics allows it.
        place = root / entry[3:]
    if place.is_dir():
        files = image_files(place)
        if not files:
            raise UserError(f"{path}: the folder {place} holds no images")
        return files
    if place.is_file():
        lines = [line.strip() for line in read_text(place).splitlines()]
        return [_listed(place, root, line) for line in lines if line]
    raise UserError(f"{path}: {entry!r} does not exist: {place}")


def _listed(list_file: Path, root: Path, line: str) -> Path:
    """An image named in a list: relative to the list's folder, or else to the set's root."""
    beside = list_file.parent / line
    return beside if beside.is_file() or not (root / line).is_file() else root / line


def _label_path(image: Path) -> Path:
    """The label file of an image: the last folder `images` of its path becomes `labels`."""
    parts = list(image.parts[:-1])
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return Path(*parts, image.name).with_suffix(".txt")


_Row = tuple[int, int, tuple[float, float, float, float]]


def _read_labels(path: Path) -> list[_Row]:
    """Line number, category and normalised corners of every line of a label file."""
    rows: list[_Row] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = [float(field) for field in line.split()]
        except ValueError:
            raise UserError(f"{where}: not numbers: {line.strip()[:60]!r}") from None
        if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
            raise UserError(
                f"{where}: {len(values)} numbers; a label is category, centre x, centre y, width, "
                "height, or a category and at least three points"
            )
        if not values[0].is_integer() or values[0] < 0:
            raise UserError(f"{where}: the category must be a whole number from 0, got {values[0]}")
        if any(value < -_TOLERANCE or value > 1 + _TOLERANCE for value in values[1:]):
            raise UserError(f"{where}: coordinates must be normalised to [0, 1] by the image size")
        rows.append((number, int(values[0]), _corners(values[1:])))
    return rows


def _corners(values: list[float]) -> tuple[float, float, float, float]:
    if len(values) == 4:
        cx, cy, w, h = values
        return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    xs, ys = values[0::2], values[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _names(path: Path, data: dict[str, Any], rows: list[list[_Row]]) -> list[str]:
    """Category names; numbers where the YAML has none."""
    names = data.get("names")
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(str(index) for index in range(len(names))):
            raise UserError(f"{path}: 'names' must number the categories 0, 1, 2, ...")
        return [str(name) for _, name in sorted(names.items(), key=lambda pair: int(pair[0]))]
    if isinstance(names, list):
        return [str(name) for name in names]
    if names is not None:
        raise UserError(f"{path}: 'names' must be a list or a mapping from number to name")
    count = data.get("nc")
    if not isinstance(count, int):
        count = 1 + max((category for labels in rows for _, category, _ in labels), default=-1)
    return [str(index) for index in range(count)]


def _check_categories(path: Path, rows: list[_Row], count: int) -> None:
    for number, category, _ in rows:
        if category >= count:
            raise UserError(
                f"{path}, line {number}: category {category}, but the set names only {count}"
            )

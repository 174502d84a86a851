"""Reader for COCO's instances format (one JSON file)."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import UserError, shown
from ...runtime.files import keys_once
from ..gathered import Gathered
from ..image_set import ImageSet, image_size, is_file, read_bytes, require_images
from ..outlines import BrokenOutline, Segment, outline

Identity = int | str

_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
"""Texts that stand for a whole number, written in the one way there is."""


def read_coco(path: Path) -> ImageSet:
    """Read a COCO instances file; its images lie beside it, in `images/`, or as COCO keeps them.

    Annotations with `iscrowd` are kept and ignored. A box is `x, y, width, height` in pixels. Ids
    may be whole numbers, written as such, with ".0" or as text, or any other text. Outlines that
    are broken matter only to who measures masks.

    Raises:
        UserError: broken JSON, a missing part, a missing image, an id that does not exist, a
            `file_name` that leads out of the folder.
    """
    data = _load(path)
    categories = _by_id(path, data, "categories")
    images = _by_id(path, data, "images")
    index_of = {category_id: index for index, category_id in enumerate(categories)}
    annotations = _group(path, data, images, index_of)
    files = _locate(path, images)
    numbers = _numbers(images)

    gathered = Gathered(path)
    for image_id, image in images.items():
        rows = annotations[image_id]
        size = _size(path, image, files[image_id])
        gathered.add(
            files[image_id],
            size,
            numbers[image_id],
            [(x, y, x + w, y + h) for x, y, w, h in (row.box for row in rows)],
            [index_of[row.category] for row in rows],
            [row.where for row in rows],
            ignore=[row.crowd for row in rows],
            area=[row.area for row in rows],
            segments=[row.outline(*size) for row in rows],
        )
    return gathered.image_set([str(c["name"]) for c in categories.values()])


def _load(path: Path) -> dict[str, Any]:
    try:
        # Bytes: the parser tells UTF-8, -16 and -32 apart.
        data = json.loads(read_bytes(path), object_pairs_hook=keys_once(shown(path)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: broken JSON: not in UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: broken JSON: nested too deeply") from None
    except ValueError as error:
        # A number of thousands of digits.
        raise UserError(f"{path}: broken JSON: {shown(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not in COCO instances format: the top level is no object")
    for part in ("images", "categories", "annotations"):
        rows = data.get(part)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path}: not in COCO instances format: it has no list {part!r}")
    return data


def _identity(value: Any) -> Identity | None:
    """An id as it is compared: 7, 7.0 and "7" are one, as COCO tools have it where they read all of
    these; None for what is no id."""
    if type(value) is float:
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        return int(value) if _WHOLE.fullmatch(value) else value or None
    return value if type(value) is int else None


def _by_id(path: Path, data: dict[str, Any], part: str) -> dict[Identity, dict[str, Any]]:
    """The rows of a list by their ids, in file order."""
    field, kinds = ("name", (str, int)) if part == "categories" else ("file_name", (str,))
    rows: dict[Identity, dict[str, Any]] = {}
    for number, row in enumerate(data[part]):
        identity = _identity(row.get("id"))
        if identity is None or not isinstance(row.get(field), kinds):
            raise UserError(f"{path}: {part}[{number}] has no usable 'id' or no {field!r}")
        if identity in rows:
            raise UserError(f"{path}: {part}[{number}] repeats the id {shown(identity)}")
        rows[identity] = row
    return rows


def _numbers(images: dict[Identity, Any]) -> dict[Identity, int]:
    """A number for each image: its id where that is one, and else one that is not taken."""
    # NumPy, with which pycocotools sorts them, holds no longer ones.
    numeric_ids = {key for key in images if isinstance(key, int) and abs(key) < 2**62}
    free = max(numeric_ids, default=0) + 1
    numbers: dict[Identity, int] = {}
    for key in images:
        if key in numeric_ids:
            numbers[key] = int(key)
        else:
            numbers[key] = free
            free += 1
    return numbers


class _Row:
    """A checked annotation.

    Attributes:
        where: file, place in the list and id, for messages.
        category: id.
        box: x, y, width, height.
        area: None where it is not stated.
    """

    def __init__(self, where: str, row: dict[str, Any], category: Identity) -> None:
        self.where, self.category = where, category
        box = row.get("bbox")
        numbers = [_number(value) for value in box] if isinstance(box, list) else []
        if len(numbers) != 4 or None in numbers:
            raise UserError(f"{where} has no 'bbox' of four numbers (x, y, width, height)")
        self.box = [value for value in numbers if value is not None]
        self.area = _number(row.get("area"))
        if self.area is None and row.get("area") is not None:
            raise UserError(f"{where} has an 'area' that is no number: {shown(repr(row['area']))}")
        self.crowd = _flag(where, row.get("iscrowd"))
        self._outline = row.get("segmentation")

    def outline(self, width: int, height: int) -> Segment | BrokenOutline | None:
        """Its outline in an image of that size; one that is broken is not yet a mistake."""
        try:
            return outline(self._outline, width, height)
        except ValueError as error:
            return BrokenOutline(shown(f"{self.where}: its 'segmentation' {error}", limit=400))


def _number(value: Any) -> float | None:
    """A number, also one written as text; None for anything else."""
    if type(value) not in (int, float, str):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def _flag(where: str, value: Any) -> bool:
    """`iscrowd`: a number, or one written as text, which would be true to Python whatever it is."""
    if value is None:
        return False
    if isinstance(value, str) and value.casefold() in ("true", "false"):
        return value.casefold() == "true"
    number = float(value) if isinstance(value, bool) else _number(value)
    if number is None or math.isnan(number):
        raise UserError(f"{where} has an 'iscrowd' that is neither 0 nor 1: {shown(repr(value))}")
    return number != 0


def _group(
    path: Path,
    data: dict[str, Any],
    images: dict[Identity, Any],
    categories: dict[Identity, int],
) -> defaultdict[Identity, list[_Row]]:
    """Checked annotations by image id."""
    grouped: defaultdict[Identity, list[_Row]] = defaultdict(list)
    for number, row in enumerate(data["annotations"]):
        where = f"{path}: annotations[{number}] (id {shown(row.get('id'), limit=40)})"
        identities: dict[str, Identity] = {}
        for key, known, part in (
            ("image_id", images, "images"),
            ("category_id", categories, "categories"),
        ):
            identity = _identity(row.get(key))
            if identity is None or identity not in known:
                raise UserError(
                    f"{where} has {key} {shown(repr(row.get(key)), limit=60)}, which is not in "
                    f"{part!r}"
                )
            identities[key] = identity
        grouped[identities["image_id"]].append(_Row(where, row, identities["category_id"]))
    return grouped


def _locate(path: Path, images: dict[Identity, dict[str, Any]]) -> dict[Identity, Path]:
    folders = [path.parent / "images", path.parent]
    if path.parent.name == "annotations":
        # COCO itself: annotations/instances_val2017.json beside val2017/ or images/val2017/.
        root, split = path.parent.parent, path.stem.rpartition("_")[2]
        folders += [root / split, root / "images" / split, root / "images"]
    files: dict[Identity, Path] = {}
    for image_id, image in images.items():
        name = image["file_name"].replace("\\", "/")
        if _leads_out(name):
            raise UserError(
                f"{path}: the image with id {shown(image_id)} has the file_name "
                f"{shown(repr(image['file_name']))}, which leads out of the set's folder; name "
                "images relative to it, without '..'"
            )
        candidates = [folder / name for folder in folders]
        files[image_id] = next((file for file in candidates if is_file(file)), candidates[0])
        # The folder that held one image most likely holds the next: try it first.
        if is_file(files[image_id]):
            hit = folders[candidates.index(files[image_id])]
            folders = [hit, *(folder for folder in folders if folder != hit)]
    require_images(path, list(files.values()))
    return files


def _leads_out(name: str) -> bool:
    """Whether a `file_name` is a path that leaves the folder of images, on any system."""
    outside = ".." in PurePosixPath(name).parts or name.startswith("/")
    return outside or re.match(r"[A-Za-z]:", name) is not None


def _size(path: Path, image: dict[str, Any], file: Path) -> tuple[int, int]:
    if image.get("width") is None or image.get("height") is None:
        return image_size(file)
    sides = [_number(image[key]) for key in ("width", "height")]
    if not all(side is not None and 0 < side < 2**31 and side.is_integer() for side in sides):
        raise UserError(
            f"{path}: image {shown(repr(image['file_name']))} has an impossible size, "
            f"{shown(repr(image['width']))} x {shown(repr(image['height']))}"
        )
    return int(sides[0] or 0), int(sides[1] or 0)

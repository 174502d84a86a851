"""Reader for YOLO sets: a `data.yaml`, images, and one label text file an image."""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ...errors import UserError, shown
from ...runtime.files import reason
from ...runtime.plain import ODD, check_keys, one_line
from ..gathered import MAX_CATEGORIES, Gathered
from ..image_set import (
    ImageSet,
    image_files,
    image_size,
    is_file,
    read_bytes,
    read_text,
    require_images,
)

_TOLERANCE = 0.01
"""How far a normalised coordinate may lie outside [0, 1]: label tools round."""

_SPLITS = ("train", "val", "validation", "test")


def read_yolo(path: Path, split: str | None = None) -> ImageSet:
    """Read a YOLO set as Ultralytics resolves it.

    `path` of the YAML is relative to the YAML's folder, or else to the working directory or the
    folder of data sets in Ultralytics' settings; `train`, `val` (or `validation`) and `test` are
    relative to `path`, each a folder, a text file that lists images, or a list of these. The labels
    of `.../images/a.jpg` are in `.../labels/a.txt`: lines of category, centre x, centre y, width,
    height, normalised; or category and the corners of a polygon, whose bounds become the box; or,
    where the YAML has a `kpt_shape`, a box and that many keypoints. An image without a label file
    holds no objects; a split without any label file is unlabelled.

    Args:
        path: the YAML file.
        split: `val`, `train` or `test`; by default `val`, and no other in its place.

    Raises:
        UserError: broken YAML, a missing split or image, a label file that is none, or a line of
            it that makes no sense.
    """
    data = _load(path)
    root = _root(path, data)
    key, entries = _split(path, data, split or "val")
    images = [file for entry in entries for file in _images(path, root, entry)]
    require_images(path, images)
    labels = [_label_path(image) for image in images]
    present = [_is_there(label) for label in labels]
    absent = {label.parent for label, there in zip(labels, present, strict=True) if not there}
    for folder in absent:
        _require_no_broken_link(folder)
    keypoints = _keypoints(path, data)
    rows = [
        _read_labels(label, keypoints) if there else []
        for label, there in zip(labels, present, strict=True)
    ]
    names = _names(path, data, rows)

    gathered = Gathered(path)
    for image_id, (image, label, objects) in enumerate(zip(images, labels, rows, strict=True), 1):
        _check_categories(label, objects, len(names))
        width, height = image_size(image)
        scale = np.array([width, height, width, height])
        gathered.add(
            image,
            (width, height),
            image_id,
            [np.array(box) * scale for _, _, box in objects],
            [category for _, category, _ in objects],
            [f"{shown(label)}, line {number}" for number, _, _ in objects],
            repeated=_repeated(objects),
        )
    return gathered.image_set(
        names, labelled=any(present), numbered=data.get("names") is None, split=key
    )


class _Loader(yaml.SafeLoader):
    """Without aliases, which no such file needs: a few lines of them stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not read", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


def _load(path: Path) -> dict[str, Any]:
    try:
        # Bytes: the parser tells UTF-8 and UTF-16 apart.
        loader = _Loader(read_bytes(path))
        root = loader.get_single_node()
        if root is not None:
            check_keys(root, loader.construct_object, shown(path))
        data = None if root is None else loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}{line}: broken YAML: {shown(problem)}") from None
    except RecursionError:
        raise UserError(f"{path}: broken YAML: nested too deeply") from None
    except ODD as error:
        # Dates that are none, numbers of thousands of digits, tags that do not fit.
        raise UserError(f"{path}: broken YAML: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a YOLO data file: no keys such as 'val' and 'names'")
    return data


def _root(path: Path, data: dict[str, Any]) -> Path:
    stated_root = data.get("path")
    if stated_root in (None, ""):
        return path.parent
    if not isinstance(stated_root, str):
        raise UserError(f"{path}: its 'path' is no name of a folder: {shown(stated_root)}")
    names = dict.fromkeys((stated_root, stated_root.replace("\\", "/")))
    candidates = [folder / name for name in names for folder in (path.parent, Path())]
    for candidate in candidates:
        if _is_folder(candidate):
            return candidate
    # Last, for it takes seconds to ask.
    candidates += [folder / name for name in names for folder in _ultralytics_folders()]
    root = next((folder for folder in candidates if _is_folder(folder)), None)
    if root is None:
        raise UserError(f"{path}: its 'path' does not exist: {shown(candidates[0])}")
    return root


def _ultralytics_folders() -> list[Path]:
    """Where Ultralytics looks for data sets on this machine, by its settings."""
    from ultralytics import utils

    return [Path(str(utils.SETTINGS["datasets_dir"])), Path(utils.DATASETS_DIR)]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _split(path: Path, data: dict[str, Any], split: str) -> tuple[str, list[str]]:
    """Under which key a split is, and its entries."""
    # Ultralytics takes one for the other.
    keys = ("val", "validation") if split == "val" else (split,)
    key = next((key for key in keys if data.get(key)), None)
    if key is None:
        known = ", ".join(key for key in _SPLITS if data.get(key)) or "none"
        raise UserError(
            f"{path}: has no split {split!r}; it has: {known} (of the keys "
            f"{shown(', '.join(map(str, data)))}); write the images to read under {split!r}"
        )
    value = data[key]
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path}: {key!r} must be a folder, a .txt file or a list of these")
    return key, entries


def _images(path: Path, root: Path, entry: str) -> list[Path]:
    """The image files of one entry of a split."""
    names = list(dict.fromkeys((entry, entry.replace("\\", "/"))))
    # Roboflow writes "../valid/images" for a folder beside the YAML; Ultralytics allows it.
    names += [name[3:] for name in names if name.startswith("../")]
    for place in (root / name for name in names):
        if _is_folder(place):
            files = image_files(place)
            if not files:
                raise UserError(f"{path}: the folder {shown(place)} holds no images")
            return files
        if is_file(place):
            lines = [line.strip() for line in read_text(place).splitlines()]
            return [_listed(place, root, line) for line in lines if line]
    raise UserError(
        f"{path}: {shown(repr(entry))} does not exist, or cannot be read: {shown(root / entry)}"
    )


def _listed(list_file: Path, root: Path, line: str) -> Path:
    """An image named in a list: relative to the list's folder, or else to the set's root; lists
    from Windows have backslashes."""
    names = dict.fromkeys((line, line.replace("\\", "/")))
    places = [folder / name for name in names for folder in (list_file.parent, root)]
    return next((place for place in places if is_file(place)), places[0])


def _label_path(image: Path) -> Path:
    """The label file of an image: the last folder `images` of its path becomes `labels`."""
    parts = list(image.parts[:-1])
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return Path(*parts, image.name).with_suffix(".txt")


def _is_there(label: Path) -> bool:
    """Whether an image has a label file; whatever else is in its place is a mistake, and not an
    image without objects."""
    try:
        status = label.stat()
    except FileNotFoundError:
        if label.is_symlink():
            raise UserError(f"{shown(label)}: is a link that leads nowhere") from None
        return False
    except OSError as error:
        raise UserError(f"{shown(label)}: cannot be read: {reason(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise UserError(f"{shown(label)}: is {kind}, where the labels of an image should be")
    return True


def _require_no_broken_link(folder: Path) -> None:
    """Refuse a missing folder of labels which is missing because a link on its way is broken."""
    for place in (folder, *folder.parents):
        if os.path.lexists(place):
            if not place.exists():
                raise UserError(f"{shown(place)}: is a link that leads nowhere")
            return


_Row = tuple[int, int, tuple[float, float, float, float]]


def _keypoints(path: Path, data: dict[str, Any]) -> int | None:
    """How many numbers of a label are keypoints; None where the set has none."""
    shape = data.get("kpt_shape")
    if shape is None:
        return None
    whole = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)
    if not whole or shape[0] < 1 or shape[1] not in (2, 3):
        raise UserError(
            f"{path}: 'kpt_shape' must be [how many keypoints, 2 or 3], not {shown(repr(shape))}"
        )
    return int(shape[0] * shape[1])


def _read_labels(path: Path, keypoints: int | None) -> list[_Row]:
    """Line number, category and normalised corners of every line of a label file."""
    rows: list[_Row] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{shown(path)}, line {number}"
        try:
            values = [float(field) for field in line.split()]
        except ValueError:
            raise UserError(f"{where}: not numbers: {shown(repr(line.strip()[:60]))}") from None
        if keypoints is not None:
            if len(values) not in (5, 5 + keypoints):
                raise UserError(
                    f"{where}: {len(values)} numbers; by the set's 'kpt_shape' a label is "
                    f"category, centre x, centre y, width, height, and {keypoints} of keypoints"
                )
            values = values[:5]
        elif len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
            raise UserError(
                f"{where}: {len(values)} numbers; a label is category, centre x, centre y, width, "
                "height, or a category and at least three points"
            )
        if not values[0].is_integer() or values[0] < 0:
            raise UserError(f"{where}: the category must be a whole number from 0, got {values[0]}")
        rows.append((number, int(values[0]), _corners(where, values[1:])))
    return rows


def _corners(where: str, values: list[float]) -> tuple[float, float, float, float]:
    """The box of a label; NaN for one that cannot be a box."""
    nothing = (math.nan, math.nan, math.nan, math.nan)
    if not all(map(math.isfinite, values)):
        return nothing
    # A side that is not positive makes no box; that is counted, and no mistake of scale.
    if len(values) == 4 and min(values[2:]) <= 0:
        return nothing
    if any(value < -_TOLERANCE or value > 1 + _TOLERANCE for value in values):
        raise UserError(f"{where}: coordinates must be normalised to [0, 1] by the image size")
    if len(values) == 4:
        cx, cy, w, h = values
        return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    xs, ys = values[0::2], values[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _repeated(objects: list[_Row]) -> list[int]:
    """Which rows say again what one before them says."""
    seen: set[tuple[int, tuple[float, float, float, float]]] = set()
    repeated = []
    for index, (_, category, box) in enumerate(objects):
        if (category, box) in seen:
            repeated.append(index)
        seen.add((category, box))
    return repeated


def _names(path: Path, data: dict[str, Any], rows: list[list[_Row]]) -> list[str]:
    """Category names; numbers where the YAML has none."""
    names, count = data.get("names"), data.get("nc")
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(str(index) for index in range(len(names))):
            raise UserError(f"{path}: 'names' must number the categories 0, 1, 2, ...")
        names = [name for _, name in sorted(names.items(), key=lambda pair: int(pair[0]))]
    if isinstance(names, list):
        if not all(isinstance(name, str | int | float) for name in names):
            raise UserError(f"{path}: 'names' must be names, one a category")
        if type(count) is int and count != len(names):
            raise UserError(
                f"{path}: 'names' has {len(names)} categories, but 'nc' says {count}; correct the "
                "one that is wrong"
            )
        return [str(name) for name in names]
    if names is not None:
        raise UserError(f"{path}: 'names' must be a list or a mapping from number to name")
    if count is not None and (type(count) is not int or not 0 < count <= MAX_CATEGORIES):
        raise UserError(
            f"{path}: 'nc' must be the number of categories, 1 to {MAX_CATEGORIES}, not "
            f"{shown(repr(count))}"
        )
    if count is None:
        count = 1 + max((category for labels in rows for _, category, _ in labels), default=-1)
        if count > MAX_CATEGORIES:
            raise UserError(
                f"{path}: has labels of category {shown(count - 1)}; {MAX_CATEGORIES} categories "
                "are the most"
            )
    return [str(index) for index in range(count)]


def _check_categories(path: Path, rows: list[_Row], count: int) -> None:
    for number, category, _ in rows:
        if category >= count:
            raise UserError(
                f"{shown(path)}, line {number}: category {shown(category)}, but the set names only "
                f"{count}"
            )

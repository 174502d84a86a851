"""Whether a calibration set is what it was made as, and stays in its folder.

A set may come from elsewhere, so its files are data that may lie: names that lead out of the
folder, links, boxes that are none. What costs next to nothing is looked at whenever a set is opened
or used. The images' hashes are computed when a set is used for the first time; that they were right
is remembered with sizes and times of the files, among the user's own state and not in the set.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import platformdirs
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError, shown
from ..runtime.files import plain_name, read_regular, reason, write_json
from ..runtime.plain import one_line

FORMAT = 1
"""Of `manifest.json`."""

MAKE_AGAIN = "restore it or make the set again"

_REMEMBERED = 200
"""Sets whose hashes are known to be right; those that were used the longest ago are forgotten."""

_TOLERANCE = 1e-3
"""How far a normalised box may reach out of its image, as rounding leaves it."""


def require_own_folders(root: Path) -> None:
    """Refuse a set whose folders are links: what is written in them would land elsewhere.

    Raises:
        UserError: naming the link.
    """
    for name in ("images", "shards"):
        if (root / name).is_symlink():
            raise UserError(f"{shown(root / name)}: is a link out of the set's folder; delete it")


def require_own_files(root: Path, names: Iterable[str]) -> None:
    """Refuse files of a set that lie elsewhere: links, and files that have a second name. Missing
    ones pass.

    Args:
        root: the set's folder; that may be reached by a link.
        names: relative to it.

    Raises:
        UserError: naming the first.
    """
    require_own_folders(root)
    for name in names:
        path = root / name
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{shown(path)}: {reason(error)}") from None
        if stat.S_ISLNK(status.st_mode):
            raise UserError(f"{shown(path)}: is a link, which may lead anywhere; {MAKE_AGAIN}")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{shown(path)}: is no regular file; {MAKE_AGAIN}")
        if status.st_nlink > 1:
            raise UserError(
                f"{shown(path)}: is a hard link: the file has another name elsewhere; copy the set "
                "(cp -r), then use the copy"
            )


def is_set_manifest(manifest: Any) -> bool:
    """Whether the content of a `manifest.json` is a set's."""
    return isinstance(manifest, dict) and {"determinants", "shards"} <= manifest.keys()


def checked_manifest(path: Path, manifest: Any) -> dict[str, Any]:
    """The manifest of a set, if it has the form that dfq gives it.

    Raises:
        UserError: where it has not.
    """
    shards = manifest.get("shards")
    right = (
        isinstance(manifest.get("determinants"), dict)
        and isinstance(manifest.get("annotations_sha256"), str)
        and isinstance(shards, list)
        and all(_is_shard(shard) for shard in shards)
    )
    if right:
        files = [name for shard in shards for name in shard["files"]]
        _check_names(path, files)
        right = [shard["index"] for shard in shards] == list(range(len(shards)))
    if not right or manifest.get("images") != len(files):
        raise UserError(f"{shown(path)}: not as dfq wrote it; make the set again")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{shown(path)}: of the format {shown(manifest.get('format'))}; this version of dfq "
            f"reads {FORMAT}; make the set again"
        )
    return dict(manifest)


def _is_shard(shard: Any) -> bool:
    return (
        isinstance(shard, dict)
        and isinstance(shard.get("files"), list)
        and len(shard["files"]) > 0
        and isinstance(shard.get("sha256"), str)
        and isinstance(shard.get("index"), int)
    )


def _check_names(path: Path, names: Sequence[Any]) -> None:
    """Refuse names of images that lead out of their folder, or would overwrite each other."""
    stems: dict[str, str] = {}
    for name in names:
        if not plain_name(name):
            raise UserError(
                f"{shown(path)}: {shown(repr(name))} is no name of a file in images/; {MAKE_AGAIN}"
            )
        stem = Path(name).stem.casefold()
        if stem in stems:
            raise UserError(
                f"{shown(path)}: {shown(repr(name))} has the same name as "
                f"{shown(repr(stems[stem]))}; {MAKE_AGAIN}"
            )
        stems[stem] = name


Parsed = tuple[list[str], list[str], list[Tensor], list[Tensor]]


def parse_annotations(path: Path, document: Any) -> Parsed:
    """Categories, files, labels and scores as in `CalibrationSet` of an `annotations.json` of ours.

    Raises:
        UserError: where it is not as dfq writes it, or names a file that is not in `images/`.
    """
    try:
        return _parse(path, document)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise UserError(
            f"{shown(path)}: not as dfq wrote it ({one_line(e, kind=True)}); {MAKE_AGAIN}"
        ) from None


def _parse(path: Path, document: Any) -> Parsed:
    categories = sorted(document["categories"], key=lambda row: row["id"])
    if [row["id"] for row in categories] != list(range(1, len(categories) + 1)):
        raise ValueError("categories are not numbered 1, 2, 3, ...")
    names = [row["name"] for row in categories]
    if not all(isinstance(name, str) for name in names):
        raise TypeError("a category without a name")
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in document["images"]}
    if len(by_image) != len(document["images"]):
        raise ValueError("two images of one id")
    for annotation in document["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    file_names = [image["file_name"] for image in document["images"]]
    _check_names(path, file_names)
    labels, scores = [], []
    for image in document["images"]:
        rows = by_image[image["id"]]
        boxes = _numbers([row["bbox"] for row in rows], 4)
        sides = _numbers([[image["width"], image["height"]]], 2).repeat(1, 2)
        boxes = boxes / sides
        boxes[:, :2] += boxes[:, 2:] / 2
        category = _numbers([[row["category_id"]] for row in rows], 1) - 1
        labels.append(torch.cat([category, boxes], dim=1).float())
        scores.append(_numbers([[row["score"]] for row in rows], 1)[:, 0].float())
    return names, [f"images/{name}" for name in file_names], labels, scores


def _numbers(rows: list[Any], columns: int) -> Tensor:
    """float64 `(n, columns)` of rows that are as long, each value a number."""
    for row in rows:
        if len(row) != columns or not all(type(value) in (int, float) for value in row):
            raise ValueError(f"{columns} numbers are wanted, not {row!r}")
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, columns)


def label_problems(
    files: Sequence[str], labels: Sequence[Tensor], scores: Sequence[Tensor], categories: int
) -> list[str]:
    """What is wrong with the labels of a set: a line an image and kind of mistake; [] for nothing.

    Args:
        files: names of the images.
        labels: `(n_i, 5)` an image: category, cx, cy, w, h in [0, 1].
        scores: `(n_i,)` an image.
        categories: how many have names.
    """
    problems = []
    for name, label, score in zip(files, labels, scores, strict=True):
        category, box = label[:, 0], label[:, 1:]
        corners = torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2])
        # All of them as what must hold: a comparison with NaN is false.
        if not bool(label.isfinite().all()) or not bool((box[:, 2:] >= 0).all()):
            problems.append(f"{name}: a box is not finite or has a negative side")
        elif not bool(((corners >= -_TOLERANCE) & (corners <= 1 + _TOLERANCE)).all()):
            problems.append(f"{name}: a box leaves the image")
        known = (category >= 0) & (category < categories) & (category == category.round())
        if not bool(known.all()):
            problems.append(f"{name}: a category is out of range (the category has no name)")
        if not bool(((score >= 0) & (score <= 1)).all()):
            problems.append(f"{name}: a score is not from 0 to 1")
    return problems


def is_readable(path: Path) -> bool:
    """Whether a file is an image; found out by Pillow, for OpenCV's libraries print what they think
    of one that is broken."""
    try:
        with Image.open(io.BytesIO(read_regular(path))) as image:
            image.load()
    except (UserError, OSError, ValueError, SyntaxError, ImportError, Image.DecompressionBombError):
        return False
    return True


def shard_digest(root: Path, files: Iterable[str]) -> str:
    """The sha256 of a shard's images, one after the other, hexadecimal.

    Raises:
        UserError: where one is missing or no regular file.
    """
    digest = hashlib.sha256()
    for name in files:
        digest.update(read_regular(root / "images" / name))
    return digest.hexdigest()


def is_as_made(root: Path, shard: Any) -> bool:
    """Whether the images of a shard are those of its record, which may be broken too."""
    try:
        return shard_digest(root, shard["files"]) == shard["sha256"]
    except (UserError, KeyError, TypeError):
        return False


def changed_shard(root: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The first shard whose images are not those the set was made with, None where all are; hashed
    only where their sizes or times are not the remembered ones.

    Args:
        root: the set's folder.
        manifest: checked.

    Raises:
        UserError: an image is missing or no regular file.
    """
    state = _state(root, manifest)
    memory = _recall()
    place = str(root.resolve())
    if memory.get(place) == state:
        return None
    for shard in manifest["shards"]:
        if shard_digest(root, shard["files"]) != shard["sha256"]:
            return dict(shard)
    memory.pop(place, None)
    memory[place] = state
    recent = dict(list(memory.items())[-_REMEMBERED:])
    # It only saves time.
    with contextlib.suppress(OSError):
        path = _memory()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, recent)
    return None


def _state(root: Path, manifest: dict[str, Any]) -> str:
    """What says that nothing was written since: sizes and times of the images, and their hashes."""
    digest = hashlib.sha256()
    for shard in manifest["shards"]:
        digest.update(repr(shard["sha256"]).encode())
        for name in shard["files"]:
            status = os.lstat(root / "images" / name)
            row = (name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            digest.update(repr(row).encode())
    return digest.hexdigest()


def _memory() -> Path:
    return Path(platformdirs.user_state_dir("dfq")) / "checked-sets.json"


def _recall() -> dict[str, str]:
    try:
        memory = json.loads(_memory().read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return memory if isinstance(memory, dict) else {}

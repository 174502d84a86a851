"""A calibration set in the layout of other tools."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml
from torch import Tensor

from ..errors import UserError
from .calibration import CalibrationSet

SPLIT = "val"


def export_yolo(data: CalibrationSet, out: Path) -> Path:
    """Write a set as the data set that Ultralytics reads: `yolo val data=OUT/data.yaml`.

        data.yaml           names; train and val are both the one split there is
        images/val/*.png    the same files (hard links where the file system allows, else copies)
        labels/val/*.txt    category, centre x, centre y, width, height, normalised

    The folder appears under its name only when it is whole.

    Args:
        data: a complete set.
        out: the folder; must not exist, or be empty.

    Returns:
        The path of `data.yaml`.

    Raises:
        UserError: where something is in the way of `out`, or the set is damaged.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file is in the way; choose another folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; choose another folder or delete it")
    _check(data)
    # The name "..", which has no parent of its own, would otherwise go wrong.
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        _write(data, partial)
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out / "data.yaml"


def _check(data: CalibrationSet) -> None:
    missing = [name for name in data.files if not (data.root / name).is_file()]
    if missing:
        raise UserError(
            f"{data.root}: {len(missing)} of {len(data)} images are missing, the first is "
            f"{missing[0]}; make the set again"
        )
    for name, label in zip(data.files, data.labels, strict=True):
        if len(label) and not 0 <= int(label[:, 0].min()) <= int(label[:, 0].max()) < len(
            data.names
        ):
            raise UserError(f"{data.root / name}: a label's category has no name")


def _write(data: CalibrationSet, folder: Path) -> None:
    images, labels = folder / "images" / SPLIT, folder / "labels" / SPLIT
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for name, label in zip(data.files, data.labels, strict=True):
        source = data.root / name
        _link(source, images / source.name)
        (labels / f"{source.stem}.txt").write_text(_lines(label))
    # No `path`: Ultralytics then takes the folder of data.yaml, wherever it is moved to, while a
    # relative `path` is looked up in the working directory first.
    description = {
        "train": f"images/{SPLIT}",
        "val": f"images/{SPLIT}",
        "names": dict(enumerate(data.names)),
    }
    text = yaml.safe_dump(description, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)


def _lines(label: Tensor) -> str:
    return "".join(
        f"{int(row[0])} {' '.join(f'{value:.8f}' for value in row[1:])}\n" for row in label.tolist()
    )

"""A calibration set in the layout of other tools."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml
from torch import Tensor

from ..errors import UserError
from ..files import read_regular, require_output_folder, short_name, user_path
from .calibration import CalibrationSet

SPLIT = "val"


def export_yolo(data: CalibrationSet, out: Path) -> Path:
    """Write a set as the data set that Ultralytics reads: `yolo val data=OUT/data.yaml`.

        data.yaml           names; train and val are both the one split there is
        images/val/*.png    copies of the files
        labels/val/*.txt    category, centre x, centre y, width, height, normalised

    The folder appears under its name only when it is whole. Nothing is read outside the set's
    folder, and nothing written outside `out`.

    Args:
        data: a complete set.
        out: the folder; must not exist, or be empty, and be no link.

    Returns:
        The path of `data.yaml`.

    Raises:
        UserError: where something is in the way of `out`, or the set is damaged.
    """
    out = user_path(out)
    require_output_folder(out, "out", link=False)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; choose another folder or delete it")
    data.require_intact()
    # The name "..", which has no parent of its own, would otherwise go wrong.
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{short_name(out.name)}.{os.getpid()}.tmp"
    partial.mkdir()
    try:
        _write(data, partial)
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out / "data.yaml"


def _write(data: CalibrationSet, folder: Path) -> None:
    images, labels = folder / "images" / SPLIT, folder / "labels" / SPLIT
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for name, label in zip(data.files, data.labels, strict=True):
        source = data.root / name
        _copy(source, images / source.name)
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


def _copy(source: Path, target: Path) -> None:
    # Never a link: the set's own file would change with what the other tool does to its own.
    with target.open("xb") as file:
        file.write(read_regular(source))


def _lines(label: Tensor) -> str:
    return "".join(
        f"{int(row[0])} {' '.join(f'{value:.8f}' for value in row[1:])}\n" for row in label.tolist()
    )

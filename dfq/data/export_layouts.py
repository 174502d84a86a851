"""A calibration set in the layout of other tools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from torch import Tensor

from ..errors import UserError
from ..runtime.files import read_regular, require_output_folder, user_path
from ..runtime.unfinished import unfinished_folder
from .calibration_set import CalibrationSet

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
    require_new_folder(out)
    data.require_intact()
    with new_folder(out) as folder:
        images = (
            (Path(name).name, read_regular(data.root / name), label)
            for name, label in zip(data.files, data.labels, strict=True)
        )
        write_yolo(folder, data.names, images)
    return user_path(out).resolve() / "data.yaml"


def require_new_folder(out: Path) -> Path:
    """Refuse a folder that is there and not empty, or cannot be made; returns the path as meant.

    Raises:
        UserError: it is one.
    """
    out = user_path(out)
    require_output_folder(out, "out", link=False)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; choose another folder or delete it")
    return out


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill within this context, which then becomes `out`; nothing is left of it where
    that fails.

    Raises:
        UserError: something is in the way of `out`.
    """
    # The name "..", which has no parent of its own, would otherwise go wrong.
    out = require_new_folder(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(out.parent, out.name) as partial:
        yield partial
        partial.replace(out)


def write_yolo(folder: Path, names: list[str], images: Iterable[tuple[str, bytes, Tensor]]) -> None:
    """Write images and labels into an empty folder in Ultralytics' layout (see `export_yolo`).

    Args:
        folder: it.
        names: category names by index.
        images: of each its file's name, the file, and its labels `(n, 5)`: category, cx, cy, w, h
            in [0, 1].
    """
    pictures, labels = folder / "images" / SPLIT, folder / "labels" / SPLIT
    pictures.mkdir(parents=True)
    labels.mkdir(parents=True)
    for name, content, label in images:
        # Never a link: the set's own file would change with what the other tool does to its own.
        with (pictures / name).open("xb") as file:
            file.write(content)
        (labels / f"{Path(name).stem}.txt").write_text(_lines(label))
    # No `path`: Ultralytics then takes the folder of data.yaml, wherever it is moved to, while a
    # relative `path` is looked up in the working directory first.
    description = {
        "train": f"images/{SPLIT}",
        "val": f"images/{SPLIT}",
        "names": dict(enumerate(names)),
    }
    text = yaml.safe_dump(description, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _lines(label: Tensor) -> str:
    return "".join(
        f"{int(row[0])} {' '.join(f'{value:.8f}' for value in row[1:])}\n" for row in label.tolist()
    )

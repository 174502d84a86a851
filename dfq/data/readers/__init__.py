"""Opening a real image set of any of the usual formats: `open_set`."""

from __future__ import annotations

from pathlib import Path

from ...errors import UserError, shown
from ...runtime.files import user_path
from ..calibration_set import CalibrationSet
from ..image_set import ImageSet, Item, image_files, image_size, is_file, make_item
from .coco import read_coco
from .voc import find_voc, is_voc, read_voc
from .yolo import read_yolo

__all__ = ["ImageSet", "Item", "open_set"]


def open_set(source: str | Path, split: str | None = None) -> ImageSet:
    """Open a set of real images.

    Args:
        source: one of

            - a folder with `annotations.json` (COCO instances format) and `images/`, or such a
              `*.json` file: images are looked for beside it, in `images/`, and, for a file in a
              folder `annotations/`, where COCO itself keeps them;
            - a YOLO `data.yaml` as Ultralytics resolves it, or a folder that holds one;
            - a Pascal VOC folder (`Annotations/`, `JPEGImages/`, `ImageSets/Main/*.txt`), also with
              `annotations/` and `images/`, or with the XML files beside the images;
            - a folder of bare images, searched with its subfolders: an unlabelled set.
        split: which split of a YOLO (`val`, `train`, `test`) or VOC set (a list's name); by
            default `val` (YOLO), or the first there is of `val`, `valid`, `validation`, `test`,
            `all`, `trainval`, `train` (VOC).

    Raises:
        UserError: the set is damaged or not understood; one line that names the file.
    """
    path = user_path(source)
    try:
        is_folder = path.is_dir()
    except OSError:
        is_folder = False
    if is_file(path):
        return _open_file(path, split)
    if not is_folder:
        raise UserError(f"{shown(path)}: no such file or folder")
    if CalibrationSet.is_one(path):
        # Of ours, which may come from elsewhere: more is known of it, and asked.
        CalibrationSet.open(path).require_intact()
    if is_file(path / "annotations.json"):
        return _without_split(path / "annotations.json", split)
    described = [path / name for name in ("data.yaml", "data.yml") if is_file(path / name)]
    if described and not is_voc(path):
        return read_yolo(described[0], split)
    layout = find_voc(path)
    if layout is not None:
        return read_voc(layout, split)
    _refuse_lost_labels(path)
    return _read_bare(path)


def _open_file(path: Path, split: str | None) -> ImageSet:
    suffix = path.suffix.lower()
    if suffix == ".json":
        if path.name == "annotations.json" and CalibrationSet.is_one(path.parent):
            CalibrationSet.open(path.parent).require_intact()
        return _without_split(path, split)
    if suffix in {".yaml", ".yml"}:
        return read_yolo(path, split)
    if suffix == ".zip":
        raise UserError(f"{path}: a ZIP file is read as a classifier's set alone; unpack it")
    raise UserError(
        f"{path}: not an image set; give a COCO .json, a YOLO data.yaml or a folder of images"
    )


def _without_split(path: Path, split: str | None) -> ImageSet:
    if split is not None:
        raise UserError(f"{path}: a COCO set has no split {split!r}; name the split's .json file")
    return read_coco(path)


def _refuse_lost_labels(folder: Path) -> None:
    """Do not take a labelled set whose description is not found for a folder of bare images, nor
    what is something else altogether."""
    if is_file(folder / "model.safetensors") and is_file(folder / "manifest.json"):
        raise UserError(f"{folder}: is a quantized run and no set; give it as --model")
    described = [
        *sorted(folder.glob("annotations/*.json")),
        *sorted(folder.glob("*.json")),
        *sorted(folder.glob("*.y*ml")),
    ]
    if described:
        raise UserError(
            f"{folder}: holds images and {described[0].relative_to(folder)}, but no "
            "annotations.json or data.yaml; name the file that describes the set"
        )
    if (folder / "labels").is_dir():
        raise UserError(f"{folder}: holds labels/ but no data.yaml that names the categories")


def _read_bare(folder: Path) -> ImageSet:
    files = image_files(folder)
    if not files:
        raise UserError(f"{folder}: holds no images and no annotations")
    items = [
        make_item(path, image_size(path), index, [], [])[0] for index, path in enumerate(files, 1)
    ]
    return ImageSet(folder, [], items, labelled=False)

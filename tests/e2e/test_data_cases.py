"""Sets of images as users have them: what each is measured as, counted as, or refused for."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from support.data_cases_parts import corners, small, small_coco, small_voc
from support.data_sets import BOX_AP, COCO_AP, Eight

import dfq
from dfq.cli.main import cli
from dfq.data.image_set import ImageSet, make_item
from dfq.data.readers import open_set
from dfq.evaluation.coco import score
from dfq.models.base import Detections, Detector

Build = Callable[[Eight, Path], Path]


@pytest.fixture(scope="session")
def eight(kit: Path) -> Eight:
    return Eight(kit / "coco-val")


@pytest.fixture(scope="session")
def detector(yolov5n: Path) -> Detector:
    return dfq.load_detector(yolov5n)


def coco(change: Callable[[dict[str, Any]], object]) -> Build:
    """A COCO set with another document."""

    def build(eight: Eight, place: Path) -> Path:
        document = eight.document()
        change(document)
        return eight.coco(place, document)

    return build


def each(part: str, **values: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Change fields of every row of a list of the document."""

    def change(document: dict[str, Any]) -> None:
        for row in document[part]:
            for key, value in values.items():
                row[key] = value(row)

    return change


def several(*changes: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for one in changes:
            one(document)

    return change


def text_image_ids(document: dict[str, Any]) -> None:
    each("images", id=lambda row: f"photo {row['id']}")(document)
    each("annotations", image_id=lambda row: f"photo {row['image_id']}")(document)


def one_as_text_the_other_as_number(document: dict[str, Any]) -> None:
    each("images", id=lambda row: str(row["id"]))(document)


def whole_float_ids(document: dict[str, Any]) -> None:
    each("images", id=lambda row: float(row["id"]))(document)
    each("annotations", id=lambda row: float(row["id"]))(document)
    each("categories", id=lambda row: float(row["id"]))(document)


def text_category_ids(document: dict[str, Any]) -> None:
    each("categories", id=lambda row: str(row["id"]))(document)
    each("annotations", category_id=lambda row: str(row["category_id"]))(document)


def broken_outlines(document: dict[str, Any]) -> None:
    kinds = [
        [[1, 2, 3]],
        {"size": [3], "counts": []},
        {"size": [426, 640], "counts": [-5, 10]},
        {"size": [426, 640], "counts": "#!"},
        "outline",
        [["a"] * 6],
        [[1e9] * 6],
        7,
    ]
    for number, row in enumerate(document["annotations"]):
        row["segmentation"] = kinds[number % len(kinds)]


def in_encoding(name: str, mark: bytes = b"") -> Build:
    """COCO's JSON in another encoding."""

    def build(eight: Eight, place: Path) -> Path:
        eight.coco(place)
        file = place / "annotations.json"
        file.write_bytes(mark + file.read_text().encode(name))
        return place

    return build


def backslashes_in_file_names(document: dict[str, Any]) -> None:
    each("images", file_name=lambda row: f".\\{row['file_name']}")(document)


def yolo(header: str = "val: images/val\n", more: str = "") -> Build:
    return lambda eight, place: eight.yolo(place, header, more)


def with_another_train(header: str) -> Build:
    """A set whose training images hold nothing: measured in place of val, AP is not there."""

    def build(eight: Eight, place: Path) -> Path:
        (place / "images" / "train").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(place / "images" / "train" / "black.png")
        (place / "labels" / "train").mkdir(parents=True)
        (place / "labels" / "train" / "black.txt").write_text("0 .5 .5 .5 .5\n")
        return eight.yolo(place, header)

    return build


def keypoints(shape: str, numbers: str) -> Build:
    return yolo(f"val: images/val\nkpt_shape: {shape}\n", f" {numbers}")


def image_list(separator: str, absolute: bool = False) -> Build:
    def build(eight: Eight, place: Path) -> Path:
        file = eight.yolo(place, "val: lists/val.txt\n")
        (place / "lists").mkdir()
        names = sorted((place / "images" / "val").iterdir())
        lines = [
            str(name) if absolute else str(name.relative_to(place)).replace("/", separator)
            for name in names
        ]
        (place / "lists" / "val.txt").write_text("\r\n".join(lines) + "\r\n")
        return file

    return build


def in_ultralytics_folder(eight: Eight, place: Path) -> Path:
    """`path:` names a folder beside other data sets, as Ultralytics' own YAML files do."""
    file = eight.yolo(place / "datasets" / "eight", "path: eight\nval: images/val\n")
    return Path(shutil.move(file, place / "eight.yaml"))


def linked_images(eight: Eight, place: Path) -> Path:
    """Images and labels on another disk, behind links, as is common."""
    eight.yolo(place / "disk")
    (place / "set").mkdir()
    for name in ("images", "labels"):
        (place / "set" / name).symlink_to(place / "disk" / name)
    return Path(shutil.copy(place / "disk" / "data.yaml", place / "set"))


def linked_subfolder(eight: Eight, place: Path) -> Path:
    """A folder of images in which a link leads to more of them, and another back up."""
    file = eight.yolo(place, "val: images\n")
    shutil.move(place / "images" / "val", place / "elsewhere")
    (place / "images" / "val").symlink_to(place / "elsewhere")
    (place / "elsewhere" / "again").symlink_to(place / "images")
    return file


def utf16_labels(eight: Eight, place: Path) -> Path:
    file = eight.yolo(place)
    for label in (place / "labels" / "val").iterdir():
        label.write_text(label.read_text(), encoding="utf-16")
    file.write_text(file.read_text(), encoding="utf-16")
    return file


def voc(annotations: str = "Annotations", images: str = "JPEGImages") -> Build:
    return lambda eight, place: eight.voc(place, annotations, images)


def voc_encoded(encoding: str, declared: str | None = None) -> Build:
    """With a Chinese folder in each file, and the encoding declared."""

    def build(eight: Eight, place: Path) -> Path:
        eight.voc(place)
        for file in (place / "Annotations").iterdir():
            body = file.read_text().replace("<size>", "<folder>文件</folder><size>")
            head = f'<?xml version="1.0" encoding="{declared or encoding}"?>\n'
            file.write_bytes((head + body).encode(encoding))
        return place

    return build


def with_spaces(listed: Callable[[str], str]) -> Build:
    def build(eight: Eight, place: Path) -> Path:
        stems = {Path(row["file_name"]).stem: f"my photo {row['id']} 1" for row in eight.images}
        eight.voc(place, stems=stems)
        (place / "ImageSets" / "Main").mkdir(parents=True)
        lines = [listed(stem) for stem in stems.values()]
        (place / "ImageSets" / "Main" / "val.txt").write_text("\n".join(lines) + "\n")
        return place

    return build


def in_subfolders(eight: Eight, place: Path) -> Path:
    """Images in a folder a camera, annotations all in one."""
    stems = {
        Path(row["file_name"]).stem: f"camera{number % 3}/{Path(row['file_name']).stem}"
        for number, row in enumerate(eight.images)
    }
    eight.voc(place)
    shutil.rmtree(place / "JPEGImages")
    eight.copy_images(place / "JPEGImages", stems)
    return place


def both_in_subfolders(eight: Eight, place: Path) -> Path:
    """The same name in each folder: only the folders tell the images apart."""
    stems = {Path(row["file_name"]).stem: f"day {row['id']}/0001" for row in eight.images}
    return eight.voc(place, "annotations", "images", stems)


def in_split_folders(eight: Eight, place: Path) -> Path:
    """train/ and valid/ with XML beside the images, as Roboflow exports them."""
    eight.voc(place, "valid", "valid")
    (place / "train").mkdir()
    Image.new("RGB", (64, 64)).save(place / "train" / "black.jpg")
    box = "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
    (place / "train" / "black.xml").write_text(
        f"<annotation><object><name>person</name><bndbox>{box}</bndbox></object></annotation>"
    )
    return place


MEASURED: dict[str, tuple[Build, float]] = {
    "coco": (coco(lambda _: None), COCO_AP),
    "iscrowd as text": (coco(each("annotations", iscrowd=lambda r: str(r["iscrowd"]))), COCO_AP),
    "iscrowd as true or false": (
        coco(each("annotations", iscrowd=lambda r: bool(r["iscrowd"]))), COCO_AP
    ),
    "iscrowd as a float": (
        coco(each("annotations", iscrowd=lambda r: f"{r['iscrowd']}.0")), COCO_AP
    ),
    "iscrowd null": (
        coco(each("annotations", iscrowd=lambda r: r["iscrowd"] or None)), COCO_AP
    ),
    "text ids of images": (coco(text_image_ids), COCO_AP),
    "numeric text ids of images": (coco(several(
        each("images", id=lambda row: str(row["id"])),
        each("annotations", image_id=lambda row: str(row["image_id"])),
    )), COCO_AP),
    "ids of images as text, of their objects as numbers": (
        coco(one_as_text_the_other_as_number), COCO_AP
    ),
    "text ids of objects": (
        coco(each("annotations", id=lambda row: f"object {row['id']}")), COCO_AP
    ),
    "text ids of categories": (coco(text_category_ids), COCO_AP),
    "whole floats for ids": (coco(whole_float_ids), COCO_AP),
    "floats for sizes": (coco(each(
        "images", width=lambda r: float(r["width"]), height=lambda r: f"{r['height']}"
    )), COCO_AP),
    "no ids of objects": (coco(lambda d: [row.pop("id") for row in d["annotations"]]), COCO_AP),
    "broken outlines where boxes are measured": (coco(broken_outlines), COCO_AP),
    "json in utf-16": (in_encoding("utf-16"), COCO_AP),
    "json with a byte-order mark": (in_encoding("utf-8", b"\xef\xbb\xbf"), COCO_AP),
    "backslashes in file names": (coco(backslashes_in_file_names), COCO_AP),
    "yolo": (yolo(), BOX_AP),
    "validation in place of val": (
        with_another_train("train: images/train\nvalidation: images/val\n"), BOX_AP
    ),
    "val beside train": (with_another_train("train: images/train\nval: images/val\n"), BOX_AP),
    "keypoints of two": (keypoints("[2, 2]", "0.1 0.2 0.3 0.4"), BOX_AP),
    "keypoints of three": (keypoints("[2, 3]", "0.1 0.2 2 0 0 0"), BOX_AP),
    "one keypoint out of the image": (keypoints("[1, 3]", "-0.5 1.7 1"), BOX_AP),
    "kpt_shape and plain boxes": (yolo("val: images/val\nkpt_shape: [17, 3]\n"), BOX_AP),
    "backslashes in a list": (image_list("\\"), BOX_AP),
    "slashes in a list": (image_list("/"), BOX_AP),
    "absolute paths in a list": (image_list("/", absolute=True), BOX_AP),
    "backslashes in the yaml": (yolo("val: images\\val\n"), BOX_AP),
    "a path from windows": (yolo("path: .\\\nval: .\\images\\val\n"), BOX_AP),
    "path in ultralytics' folder": (in_ultralytics_folder, BOX_AP),
    "images behind links": (linked_images, BOX_AP),
    "a linked folder among images": (linked_subfolder, BOX_AP),
    "labels in utf-16": (utf16_labels, BOX_AP),
    "names and nc agree": (yolo("val: images/val\nnc: 80\n"), BOX_AP),
    "voc": (voc(), BOX_AP),
    "voc in gb2312": (voc_encoded("gb2312"), BOX_AP),
    "voc in gbk": (voc_encoded("gbk", "GBK"), BOX_AP),
    "voc in utf-16": (voc_encoded("utf-16"), BOX_AP),
    "voc in utf-16 without a mark": (voc_encoded("utf-16-le", "utf-16"), BOX_AP),
    "voc that says utf-16 and is not": (voc_encoded("utf-8", "utf-16"), BOX_AP),
    "voc in big5": (voc_encoded("big5", "Big5"), BOX_AP),
    "voc names with spaces": (with_spaces(lambda stem: stem), BOX_AP),
    "voc names with spaces and a column": (with_spaces(lambda stem: f"{stem}  1"), BOX_AP),
    "voc lists with endings": (with_spaces(lambda stem: f"JPEGImages\\{stem}.jpg"), BOX_AP),
    "annotations and images": (voc("annotations", "images"), BOX_AP),
    "Annotations and images": (voc("Annotations", "images"), BOX_AP),
    "xml beside the images": (voc(".", "."), BOX_AP),
    "xml beside the images in a subfolder": (voc("one/two", "one/two"), BOX_AP),
    "images in subfolders": (in_subfolders, BOX_AP),
    "images and xml in subfolders": (both_in_subfolders, BOX_AP),
    "folders for splits": (in_split_folders, BOX_AP),
}  # fmt: skip


@pytest.mark.parametrize("case", MEASURED)
def test_what_is_measured(
    case: str, eight: Eight, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics import utils

    folder = tmp_path / "datasets"
    monkeypatch.setattr(utils, "SETTINGS", {"datasets_dir": str(folder)})
    monkeypatch.setattr(utils, "DATASETS_DIR", folder)
    build, expected = MEASURED[case]
    source = build(eight, tmp_path)
    found = dfq.evaluate(detector, source, image_size=320)
    assert pytest.approx(expected, abs=5e-5) == found.AP
    assert found.images == 8
    assert found.dropped == 0


def coco_boxes(document: dict[str, Any]) -> None:
    """Zero, negative, NaN, infinite and too large; the first of them the fourth row."""
    image, category = document["images"][2]["id"], document["categories"][0]["id"]
    boxes = (
        [1, 2, 0, 5],
        [1, 2, 5, -3],
        [float("nan"), 0, 5, 5],
        [0, 0, float("inf"), 5],
        [0, 0, 1e300, 5],
        [100, 100, 1e-9, 5],
    )
    rows = [
        {"id": 10**6 + n, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0}
        for n, box in enumerate(boxes)
    ]
    document["annotations"][3:3] = rows


def yolo_boxes(eight: Eight, place: Path) -> Path:
    file = eight.yolo(place)
    label = place / "labels" / "val" / "000000000632.txt"
    bad = "0 .5 .5 0 .5\n0 .5 .5 -.2 .5\n0 nan .5 .5 .5\n0 .5 .5 inf .5\n0 .1 .1 .5 .1 .9 .1\n"
    label.write_text(bad + label.read_text())
    return file


def voc_boxes(eight: Eight, place: Path) -> Path:
    """The corners of the second object of an image are swapped, in two orders and both."""
    eight.voc(place)
    file = place / "Annotations" / "000000000776.xml"
    rows = [(9, 1, 1, 9), (1, 9, 9, 1), (9, 9, 1, 1), ("nan", 1, 9, 9)]
    objects = "".join(
        f"<object><name>person</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d in rows
    )
    first, found, rest = file.read_text().partition("</object>")
    file.write_text(f"{first}{found}{objects}{rest}")
    return place


DROPPED: dict[str, tuple[Build, int, str, float]] = {
    "coco": (coco(coco_boxes), 6, r"annotations\[3\] \(id 1000000\)", COCO_AP),
    "yolo": (yolo_boxes, 5, r"000000000632\.txt, line 1", BOX_AP),
    "voc": (voc_boxes, 4, r"000000000776\.xml: object 2", BOX_AP),
}


@pytest.mark.parametrize("case", DROPPED)
def test_boxes_that_are_none_are_counted_and_named(
    case: str, eight: Eight, yolov5n: Path, tmp_path: Path
) -> None:
    build, count, first, expected = DROPPED[case]
    source = build(eight, tmp_path / "set")
    words = ["eval", "--model", str(yolov5n), "--data", str(source), "--image-size", "320"]
    result = CliRunner().invoke(cli, [*words, "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 0, result.output
    assert re.search(rf"{count} boxes left out .*{first}", result.stdout)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["AP"] == pytest.approx(expected, abs=5e-5)
    assert found["dropped"] == count
    assert re.search(first, found["first_dropped"])
    # And by who looks at the set.
    shown = CliRunner().invoke(cli, ["data", "show", str(source)])
    assert shown.exit_code == 0, shown.output
    assert re.search(rf"{count} boxes left out .*{first}", shown.stdout.replace("\n", ""))


def label_is(make: Callable[[Path], object], folder: bool = False) -> Callable[[Path], Path]:
    """A YOLO set in which something else is in a label file's place, or in its folder's."""

    def build(place: Path) -> Path:
        file = small(place, "")
        (place / "labels" / "a.txt").unlink()
        if folder:
            (place / "labels").rmdir()
        make(place / "labels" if folder else place / "labels" / "a.txt")
        return file

    return build


def loops(path: Path) -> None:
    path.symlink_to(path.name)


def header(text: str) -> Callable[[Path], Path]:
    def build(place: Path) -> Path:
        file = small(place, "0 .5 .5 .5 .5\n")
        file.write_text(text)
        return file

    return build


NO_SPLIT = r"no split 'val'; it has: train, test \(of the keys train, test, names"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "only boxes without a width": (
        lambda p: small(p, "0 .5 .5 0 .5\n0 .5 .5 nan .5\n"),
        r"none of its 2 boxes is usable.*a\.txt, line 1",
    ),
    "only boxes of coco that are negative": (
        lambda p: small_coco(p, annotation={"bbox": [8, 8, -4, 4]}),
        r"none of its 1 boxes is usable.*annotations\[0\]",
    ),
    "only boxes of voc whose corners are swapped": (
        lambda p: small_voc(p, corners(9, 9, 1, 1)),
        r"none of its 1 boxes is usable.*a\.xml: object 1",
    ),
    "a label file that is a folder": (label_is(Path.mkdir), r"a\.txt: is a folder"),
    "a label file that is a looping link": (label_is(loops), r"a\.txt: cannot be read: links"),
    "a label file that is a link to nothing": (
        label_is(lambda p: p.symlink_to("nowhere")), r"a\.txt: is a link that leads nowhere"
    ),
    "a label file that is a pipe": (label_is(os.mkfifo), r"a\.txt: is no regular file"),
    "a folder of labels that is a looping link": (
        label_is(loops, folder=True), r"a\.txt: cannot be read: links"
    ),
    "a folder of labels that is a link to nothing": (
        label_is(lambda p: p.symlink_to("nowhere"), folder=True),
        r"labels: is a link that leads nowhere",
    ),
    "a folder of labels that is a file": (
        label_is(Path.touch, folder=True), r"a\.txt: cannot be read: a file is where a folder"
    ),
    "no val": (header("train: images\ntest: images\nnames: [a, b, c]\n"), NO_SPLIT),
    "an empty val": (header("train: images\nval:\ntest: images\nnames: [a]\n"), "no split 'val'"),
    "kpt_shape of text": (
        header("val: images\nkpt_shape: many\nnames: [a]\n"), "'kpt_shape' must be"
    ),
    "kpt_shape of four numbers each": (
        header("val: images\nkpt_shape: [3, 4]\nnames: [a]\n"), "'kpt_shape' must be"
    ),
    "names shorter than nc": (
        header("val: images\nnames: [a, b]\nnc: 3\n"), "'names' has 2 categories, but 'nc' says 3"
    ),
    "names longer than nc": (
        header("val: images\nnames: {0: a, 1: b}\nnc: 1\n"), "has 2 categories, but 'nc' says 1"
    ),
    "a billion categories": (header("val: images\nnc: 1000000000\n"), "'nc' must be the number"),
    "a label of a billion": (
        lambda p: _without_names(small(p, "1000000000 .5 .5 .5 .5\n")), "100000 categories are"
    ),
    "yaml with aliases": (
        header("val: images\na: &a [x, x]\nb: &b [*a, *a]\nnames: [*b, *b]\n"),
        "line 3: broken YAML: aliases are not read",
    ),
    "yaml nested deeply": (
        header("val: images\nnames: " + "[" * 3000 + "]" * 3000), "broken YAML: nested too deeply"
    ),
    "yaml with an endless number": (
        header(f"val: images\nnames: [a]\nnc: {'9' * 5000}\n"), "broken YAML: Exceeds the limit"
    ),
    "yaml with a key given twice": (
        header("val: images\nnames: [a, b]\nval: images\n"),
        r"data\.yaml: the key 'val' is there twice, in lines 1 and 3: keep one",
    ),
    "yaml with a category given twice": (
        header("val: images\nnames:\n  0: a\n  0: b\n"),
        r"data\.yaml: the key 0 is there twice, in lines 3 and 4: keep one",
    ),
    "yaml with a truth value that is none": (
        header("val: images\nnames: [a]\nnc: !!bool maybe\n"), "broken YAML: 'maybe'"
    ),
    "yaml with a date that is none": (
        header("val: images\nnames: [a]\ndate: !!timestamp soon\n"), "broken YAML: "
    ),
    "coco with a key given twice": (
        lambda p: _write(
            small_coco(p) / "annotations.json",
            b'{"images": [], "annotations": [], "categories": [], "images": []}',
        ),
        r"annotations\.json: the key 'images' is there twice: keep one",
    ),
    "iscrowd that is neither": (
        lambda p: small_coco(p, annotation={"iscrowd": "perhaps"}),
        r"annotations\[0\] \(id 1\) has an 'iscrowd' that is neither 0 nor 1: 'perhaps'",
    ),
    "half an id": (lambda p: small_coco(p, images={"id": 1.5}), r"images\[0\] has no usable 'id'"),
    "an id that is a list": (
        lambda p: small_coco(p, annotation={"image_id": [1]}), r"image_id \[1\], which is not in"
    ),
    "half a pixel of width": (
        lambda p: small_coco(p, images={"width": 640.5}), "impossible size, 640.5 x 48"
    ),
    "an infinite width": (
        lambda p: small_coco(p, images={"width": float("inf")}), "impossible size, inf x 48"
    ),
    "coco with an endless number": (
        lambda p: _write(small_coco(p) / "annotations.json", b"[" + b"9" * 5000 + b"]"),
        "broken JSON: Exceeds the limit",
    ),
    "voc in no encoding": (
        lambda p: small_voc(p, b'<?xml version="1.0" encoding="klingon"?><annotation/>'),
        "unknown encoding, klingon",
    ),
    "voc in another encoding than it says": (
        lambda p: small_voc(p, "<?xml?><annotation>图片说明</annotation>".encode("gbk")),
        r"a\.xml: is not a text file in UTF-8",
    ),
    "voc with XML of another kind": (
        lambda p: small_voc(p, b"<project><owner/></project>"),
        r"a\.xml: is no annotation: its XML is a 'project'",
    ),
    "voc with entities": (
        lambda p: small_voc(p, b'<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'),
        "declares entities",
    ),
}  # fmt: skip


def _without_names(file: Path) -> Path:
    file.write_text("val: images\n")
    return file


def _write(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.tiny_detector import tiny_detector

    from dfq.models import save_detector

    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_detector(tiny_detector(), path)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path, tiny: Path) -> None:
    build, message = REFUSED[case]
    source = build(tmp_path / "set")
    out = tmp_path / "a.json"
    words = ["eval", "--model", str(tiny), "--data", str(source), "--json", str(out)]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert re.search(message, lines[0]), lines[0]
    assert not out.exists()


def digits(names: list[str]) -> ImageSet:
    """An image with an object of each category, from left to right in their order."""
    boxes = [[10.0 * n, 10, 10 * n + 9, 20] for n in range(10)]
    item, _ = make_item(Path("a.png"), (100, 30), 1, boxes, list(range(10)))
    return ImageSet(Path("digits"), names, [item])


MODEL = [*map(str, range(1, 10)), "0"]


def of_the_model(names: list[str]) -> list[Detections]:
    """A detection of every object of `digits(names)`, with the model's index of its name."""
    item = digits(names).items[0]
    labels = torch.tensor([MODEL.index(name) for name in names])
    return [Detections(torch.from_numpy(item.boxes), torch.linspace(0.9, 0.1, 10), labels)]


def test_digits_are_matched_by_name() -> None:
    names = [*map(str, range(10))]
    assert pytest.approx(1) == score(digits(names), of_the_model(names), MODEL).AP


def test_numbers_count_as_positions_where_no_name_is_shared() -> None:
    letters = list("abcdefghij")
    assert digits([*map(str, range(10))]).category_mapping(letters) == list(range(10))
    # One shared name is enough for names to count.
    shared = ["0", *letters[1:]]
    assert digits([*map(str, range(10))]).category_mapping(shared) == [0] + [None] * 9
    with pytest.raises(dfq.UserError, match="no category name is shared"):
        digits([*map(str, range(10))]).category_mapping(letters[:9])


def test_a_set_without_names_has_positions_only(tmp_path: Path) -> None:
    file = small(tmp_path, "0 .5 .5 .5 .5\n2 .2 .2 .1 .1\n")
    file.write_text("val: images\n")
    # Its numbers are no names, whatever the model's are called.
    assert open_set(file).category_mapping(["2", "1", "0"]) == [0, 1, 2]


def test_a_run_says_what_it_left_out(tmp_path: Path, tiny: Path) -> None:
    file = small(tmp_path / "set", "0 .5 .5 .5 .5\n0 .5 .5 0 .5\n")
    run = dfq.quantize(
        dfq.Recipe(),
        model=tiny,
        data=file,
        image_size=64,
        out=tmp_path / "run",
        overrides={"method": "ptq", "evaluation.data": str(file), "evaluation.image_size": 64},
        device="cpu",
    )
    assert "1 boxes left out" in (run / "log.txt").read_text()
    measured = json.loads((run / "metrics.json").read_text())["evaluation"]["quantized"]
    assert measured["dropped"] == 1
    assert measured["first_dropped"].endswith("a.txt, line 2")


def test_photos_of_a_camera_are_no_annotations(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "a.xml").write_text("<NonRealTimeMeta/>")
    assert not open_set(tmp_path).labelled

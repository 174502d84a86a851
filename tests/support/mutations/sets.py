"""Damaged sets of images: those of dfq, finished and not, and those of COCO, YOLO and VOC."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

from PIL import Image

from support.data_cases_parts import corners, small_voc
from support.mutations.cases import (
    Case,
    Kind,
    Things,
    Words,
    evaluate,
    quantize,
    sensitivity,
    some_of,
)
from support.mutations.damage import (
    CODE,
    PATHS,
    flipped,
    mutate_bytes,
    mutate_tree,
    nested,
    odd_value,
    truncated,
    with_key_twice,
)


def looked_at(things: Things, draw: random.Random, root: str | Path) -> list[Words]:
    """Commands that use a calibration set."""
    return some_of(
        draw,
        ("data", "show", root, "--json", "out.json"),
        ("data", "verify", root),
        ("data", "export", root, "--out", "out"),
        evaluate(things.model, root),
        quantize(things.model, root),
        sensitivity(things.model, root),
        most=3,
    )


def _copy(things: Things, place: Path) -> Path:
    return Path(shutil.copytree(things.made, place / "set")).relative_to(place)


def own_images(things: Things, place: Path, draw: random.Random) -> Case:
    """Images that are not those the set was made with: by hashes, or by what lies there."""
    root = _copy(things, place)
    files = sorted((root / "images").iterdir())
    file, other = draw.sample(files, 2)
    data = file.read_bytes()
    what = draw.choice(["flip", "cut", "gone", "link", "hard", "pipe", "folder", "swap", "text"])
    if what == "flip":
        file.write_bytes(flipped(data, draw))
    elif what == "cut":
        file.write_bytes(truncated(data, draw))
    elif what == "text":
        file.write_text(draw.choice(CODE))
    elif what == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    else:
        file.unlink()
        if what == "link":
            file.symlink_to(draw.choice([other.name, "/dev/zero", "/etc/passwd", file.name, "no"]))
        elif what == "hard":
            (place / "beside.png").write_bytes(data)
            os.link(place / "beside.png", file)
        elif what == "pipe":
            os.mkfifo(file)
        elif what == "folder":
            file.mkdir()
    return Case(f"{what}: {file.name}", looked_at(things, draw, root), refused=True)


def own_annotations(things: Things, place: Path, draw: random.Random) -> Case:
    """`annotations.json` is not what the manifest records, sealed again or not."""
    root = _copy(things, place)
    path = root / "annotations.json"
    text = path.read_text()
    what = draw.choice(["tree", "bytes", "twice", "cut", "sealed", "sealed", "deep"])
    if what in ("tree", "sealed"):
        document, done = mutate_tree(json.loads(text), draw, draw.choice([1, 1, 3]))
        changed = json.dumps(document)
    else:
        done = what
        changed = {
            "twice": lambda: with_key_twice(text, draw),
            "cut": lambda: text[: draw.randrange(len(text) - 2)],
            "deep": lambda: "[" * 100_000,
            "bytes": lambda: mutate_bytes(text.encode(), draw).decode("latin-1"),
        }[what]()
    same = changed == text or (what == "tree" and json.loads(changed) == json.loads(text))
    path.write_text(changed)
    if what == "sealed":
        manifest = json.loads((root / "manifest.json").read_text())
        manifest["annotations_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (root / "manifest.json").write_text(json.dumps(manifest))
    refused = what != "sealed" and not same
    return Case(f"{what}: {done}", looked_at(things, draw, root), refused)


def own_manifest(things: Things, place: Path, draw: random.Random) -> Case:
    """`manifest.json` is another. What it tells of the making is not checked, all else is."""
    root = _copy(things, place)
    path = root / "manifest.json"
    document = json.loads(path.read_text())
    checked = ["shards", "annotations_sha256", "images", "format"]
    what = draw.choice(["tree", "checked", "checked", "path", "twice", "cut", "other", "gone"])
    done = what
    if what == "tree":
        document, done = mutate_tree(document, draw, draw.choice([1, 3]))
        text = json.dumps(document)
    elif what == "checked":
        key = draw.choice(checked)
        document[key] = draw.choice([None, "x", [], {}, -1, 1e9, [{}], "0" * 64, nested(80)])
        done, text = f"{key}: {document[key]}", json.dumps(document)
    elif what == "path":
        shard = draw.choice(document["shards"])
        shard["files"][0] = draw.choice([p for p in PATHS if p not in ("*", "con", "a@b@c")])
        done, text = shard["files"][0], json.dumps(document)
    elif what == "twice":
        text = with_key_twice(path.read_text(), draw)
    elif what == "cut":
        text = path.read_text()[:-3]
    elif what == "other":
        text = draw.choice(["[]", "null", "3", "{}", "", "\0", '"x"', "[" * 100_000])
    else:
        text = ""
    path.write_text(text, errors="backslashreplace")
    if what == "gone":
        path.unlink()
    commands = looked_at(things, draw, root)
    # Without one it is a set of somebody else's that is measured, or photos.
    refused = what in ("checked", "path", "twice", "cut")
    if what in ("other", "gone"):
        commands = [("data", "verify", root), quantize(things.model, "set/manifest.json")]
        refused = True
    return Case(f"{what}: {done}"[:200], commands, refused)


def own_begun(things: Things, place: Path, draw: random.Random) -> Case:
    """A set that was interrupted, and then damaged: made whole again or refused."""
    root = Path(shutil.copytree(things.begun_set, place / "out")).relative_to(place)
    names = sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    path = draw.choice([n for n in names if n.suffix == ".json"] or names)
    if draw.random() < 0.3:
        path = draw.choice(names)
    what = draw.choice(["tree", "cut", "bytes", "folder", "link", "pipe", "twice"])
    identity = path.name == "identity.json"
    if path.suffix != ".json" and what in ("tree", "twice"):
        what = "bytes"
    if what == "tree":
        document, _ = mutate_tree(json.loads(path.read_text()), draw)
        path.write_text(json.dumps(document))
    elif what == "twice":
        path.write_text(with_key_twice(path.read_text(), draw))
    elif what == "cut":
        path.write_bytes(truncated(path.read_bytes()[:-3], draw))
    elif what == "bytes":
        path.write_bytes(mutate_bytes(path.read_bytes(), draw))
    else:
        path.unlink()
        if what == "folder":
            path.mkdir()
        elif what == "link":
            path.symlink_to(draw.choice(["/etc/passwd", "nowhere", path.name]))
        else:
            os.mkfifo(path)
    command: Words = (
        "synthesize", "--model", things.model, "--recipe", "tiny.yaml", "--out", root, "--workers",
        "1",
    )  # fmt: skip
    refused = identity and what in ("cut", "twice")
    return Case(f"{what}: {path.name}", [("data", "show", root), command][1:], refused)


def _measured(things: Things, draw: random.Random, root: str | Path) -> list[Words]:
    return [
        evaluate(things.model, root),
        *some_of(
            draw,
            ("data", "show", root, "--json", "out.json"),
            ("data", "show", root, "--grid", "out.png"),
            quantize(things.model, root),
            sensitivity(things.model, root),
            most=1,
        ),
    ]


def coco(things: Things, place: Path, draw: random.Random) -> Case:
    """A COCO set: some damage makes another set, some none that can be measured."""
    root = place / "set"
    (root / "images").mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (64, 48), (90, 30, 200)).save(root / "images" / name)
    outline = [[8, 8, 30, 8, 30, 30]]
    document = {
        "info": {"year": 2020},
        "images": [
            {"id": 1, "file_name": "a.png", "width": 64, "height": 48},
            {"id": 2, "file_name": "b.jpg", "width": 64, "height": 48},
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": n, "bbox": [8, 8, 24, 24], "area": 576,
             "iscrowd": 0, "segmentation": outline}
            for n in (1, 2)
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }  # fmt: skip
    text = json.dumps(document)
    what = draw.choice(
        ["tree", "tree", "tree", "twice", "path", "cut", "bytes", "image", "outline"]
    )
    done = what
    if what == "tree":
        changed, done = mutate_tree(document, draw, draw.choice([1, 1, 2, 4]))
        text = json.dumps(changed)
    elif what == "twice":
        text = with_key_twice(text, draw)
    elif what == "path":
        away = ["../set/images/a.png", "/etc/passwd", "..", "images/../../x.png", "\0", "a" * 400]
        document["images"][1]["file_name"] = done = draw.choice([*away, "/dev/zero", "x/" * 900])
        text = json.dumps(document)
    elif what == "cut":
        text = text[: draw.randrange(len(text))]
    elif what == "bytes":
        text = mutate_bytes(text.encode(), draw).decode("latin-1")
    elif what == "outline":
        document["annotations"][0]["segmentation"] = draw.choice(
            [{"counts": odd_value(draw), "size": [48, 64]}, {"counts": [3072], "size": [10**9, 1]},
             {"counts": "1" * 5000, "size": [48, 64]}, odd_value(draw), [odd_value(draw)],
             [[float("nan")] * 6], {"counts": [10**9] * 9, "size": [48, 64]}]
        )  # fmt: skip
        text = json.dumps(document)
    (root / "annotations.json").write_text(text)
    if what == "image":
        file = draw.choice(sorted((root / "images").iterdir()))
        file.write_bytes(truncated(file.read_bytes(), draw)[:-20])
    return Case(
        f"{what}: {done}"[:200],
        _measured(things, draw, draw.choice(["set", "set/annotations.json"])),
        # A header is enough to look at a set.
        refused=what in ("twice", "path", "cut"),
    )


def yolo(things: Things, place: Path, draw: random.Random) -> Case:
    """A YOLO set."""
    for folder in ("images", "labels"):
        (place / "set" / folder).mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(place / "set" / "images" / name)
        (place / "set" / "labels" / name).with_suffix(".txt").write_text("0 .5 .5 .5 .5\n")
    lines = ["path: .", "val: images", "names: {0: a, 1: b, 2: c}", "nc: 3"]
    file, label = place / "set" / "data.yaml", place / "set" / "labels" / "a.txt"
    what = draw.choice(["twice", "value", "value", "bytes", "label", "label", "row", "tag", "path"])
    done = what
    if what == "twice":
        lines.append(draw.choice(lines))
    elif what == "value":
        key = draw.choice(["path", "val", "names", "nc", "kpt_shape"])
        lines = [line for line in lines if not line.startswith(f"{key}:")]
        lines.append(f"{key}: {json.dumps(odd_value(draw))}")
        done = lines[-1][:150]
    elif what == "path":
        lines[1] = f"val: {json.dumps(draw.choice([p for p in PATHS if set(p) - set('./')]))}"
        done = lines[1][:150]
    elif what == "tag":
        tags = ["!!bool x", "!!int ''", "!!timestamp x", "!!set 3", "!!binary x", "!!float ''"]
        tags += ["!x y", "!!omap [3]", "!!pairs x", "!!map x", "&a [*a]", "? [a]\n: 3", CODE[5]]
        done = draw.choice(tags)
        lines.append(f"nc: {done}" if draw.random() < 0.5 else f"extra: {done}")
        lines = [line for line in lines if line != "nc: 3"]
    elif what == "row":
        odd = ["nan", "inf", "1e999", "-1", "9" * 400, "x", "", CODE[1], "\0", "0x1", "1_0", "٣"]
        row = ["0", ".5", ".5", ".5", ".5"]
        row[draw.randrange(5)] = done = draw.choice(odd)
        label.write_text(" ".join(row))
    elif what == "label":
        label.unlink()
        done = draw.choice(["folder", "pipe", "link", "loop", "bytes"])
        if done == "folder":
            label.mkdir()
        elif done == "pipe":
            os.mkfifo(label)
        elif done == "link":
            label.symlink_to("nowhere")
        elif done == "loop":
            label.symlink_to("a.txt")
        else:
            label.write_bytes(draw.randbytes(50) + b"\xff")
    text = "\n".join(lines) + "\n"
    file.write_text(text)
    if what == "bytes":
        file.write_bytes(mutate_bytes(text.encode(), draw))
    refused = what in ("twice", "label", "path")
    return Case(f"{what}: {done}"[:200], _measured(things, draw, "set/data.yaml"), refused)


def voc(things: Things, place: Path, draw: random.Random) -> Case:
    """A VOC set."""
    head = b'<?xml version="1.0" encoding="utf-8"?>'
    body = corners(1, 2, 30, 40)
    what = draw.choice(["bytes", "bytes", "value", "entity", "deep", "cut", "name", "encoding"])
    done = what
    if what == "bytes":
        xml = mutate_bytes(head + body, draw)
    elif what == "value":
        values = [1, 2, 30, 40]
        values[draw.randrange(4)] = draw.choice(["nan", "inf", "1e400", "x", "", "9" * 5000, "-5"])
        done, xml = f"{values}"[:99], head + corners(*values)
    elif what == "entity":
        xml = (
            head
            + b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;'
            + (b"</annotation>")
        )
    elif what == "deep":
        xml = head + b"<a>" * 20_000 + b"</a>" * draw.choice([0, 20_000])
    elif what == "cut":
        xml = (head + body)[: draw.randrange(10, len(head + body) - 5)]
    elif what == "name":
        xml = body.replace(b"<annotation>", b"<annotation><filename>../../x</filename>")
    else:
        xml = b'<?xml version="1.0" encoding="' + draw.choice(
            [b"x", b"utf-7", b"rot13", b"zlib", b"base64", b"idna", b"utf-16", b"unicode_escape"]
        ) + b'"?>' + body  # fmt: skip
    small_voc(place / "set", xml)
    refused = what in ("entity", "cut", "deep")
    return Case(f"{what}: {done}", _measured(things, draw, "set"), refused)


KINDS: dict[str, Kind] = {
    "images of a set": own_images,
    "annotations of a set": own_annotations,
    "manifest of a set": own_manifest,
    "a set that was begun": own_begun,
    "coco": coco,
    "yolo": yolo,
    "voc": voc,
}

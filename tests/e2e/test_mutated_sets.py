"""Sets that a seeded generator has damaged: measured, or refused in one line, and never more."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import command
from test_data_cases import corners, small, small_coco, small_voc
from test_outputs import everything

ODD: list[Any] = [
    None, True, False, -1, 0, 1.5, float("nan"), float("inf"), 10**400, 10**20, "", "abc", "7",
    "nan", "..", "/etc/passwd", "\0", "\ud800", "a\nb", "x" * 5000, [], [1], {}, {"a": 1}, [[[]]],
    "~nobody/x", "9" * 5000, 1e-320, -0.0,
]  # fmt: skip
"""What no field of a document expects."""


def fields(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within a document."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        pairs = []
    below = [way for key, one in pairs for way in fields(one, (*above, key))]
    return [above, *below] if above else below


def mutate_document(text: str, draw: random.Random) -> str:
    """Replace, remove or repeat some values of a JSON document."""
    document = json.loads(text)
    for _ in range(draw.choice([1, 1, 2, 3])):
        ways = fields(document)
        if not ways:
            break
        *above, last = draw.choice(ways)
        place = document
        for key in above:
            place = place[key]
        what = draw.random()
        if what < 0.7:
            place[last] = draw.choice(ODD)
        elif what < 0.85:
            del place[last]
        else:
            place[last] = [place[last]] * 3
    return json.dumps(document)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Change, insert, remove or repeat some bytes."""
    found = bytearray(data)
    for _ in range(draw.choice([1, 3, 20])):
        at, what = draw.randrange(len(found) + 1), draw.random()
        if what < 0.4 and found:
            found[at % len(found)] = draw.randrange(256)
        elif what < 0.6:
            found[at:at] = draw.randbytes(draw.randrange(9))
        elif what < 0.8:
            del found[at : at + draw.randrange(30)]
        else:
            found[at:at] = found[: draw.randrange(50)]
    return bytes(found)


def document_of(name: str) -> Callable[[Path, random.Random], None]:
    def damage(root: Path, draw: random.Random) -> None:
        path = root / name
        path.write_text(mutate_document(path.read_text(), draw))

    return damage


def bytes_of(*names: str) -> Callable[[Path, random.Random], None]:
    def damage(root: Path, draw: random.Random) -> None:
        path = root / draw.choice(names)
        path.write_bytes(mutate_bytes(path.read_bytes(), draw))

    return damage


def yolo(place: Path) -> None:
    small(place, "0 .5 .5 .5 .5\n1 .2 .2 .1 .1\n")
    (place / "data.yaml").write_text("path: .\nval: images\nnames: {0: a, 1: b, 2: c}\nnc: 3\n")


def coco(place: Path) -> None:
    outline = [[1, 1, 5, 1, 5, 5]]
    small_coco(place, annotation={"segmentation": outline, "iscrowd": 0})


KINDS: dict[str, tuple[Callable[[Path], object] | None, Callable[[Path, random.Random], None]]] = {
    "annotations of ours": (None, document_of("annotations.json")),
    "manifest of ours": (None, document_of("manifest.json")),
    "bytes of ours": (None, bytes_of("annotations.json", "manifest.json")),
    "images of ours": (None, bytes_of("images/00000000.png", "images/00000003.png")),
    "coco": (coco, document_of("annotations.json")),
    "bytes of coco": (coco, bytes_of("annotations.json")),
    "yolo": (yolo, bytes_of("data.yaml", "labels/a.txt")),
    "voc": (
        lambda place: small_voc(
            place, b'<?xml version="1.0" encoding="utf-8"?>' + corners(1, 2, 9, 9)
        ),
        bytes_of("Annotations/a.xml"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(15))
def test_a_damaged_set(place: Path, model: Path, made: Path, kind: str, seed: int) -> None:
    make, damage = KINDS[kind]
    root = place / "set"
    if make is None:
        shutil.copytree(made, root)
    else:
        make(root)
    before = everything(root)
    damage(root, random.Random(f"{kind} {seed}"))
    same = everything(root) == before
    outside = {name: what for name, what in everything(place).items() if name != "home"}
    for words in (
        ("data", "show", root),
        ("eval", "--model", model, "--data", root),
        ("data", "verify", root),
        ("data", "export", root, "--out", "out"),
        ("qat", "--recipe", "tiny.yaml", "--model", model, "--data", root, "--out", "out"),
    ):
        if words[0] == "qat" and seed % 5:
            continue
        result = command(*words)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.exit_code in (0, 2), result.output
        assert (result.exit_code == 2) == bool(errors)
        assert len(errors) < 2 or words[1] == "verify"
        # All that a set of ours consists of is checked, but for what the manifest tells of it.
        if make is None and "manifest" not in kind and "bytes of ours" not in kind:
            assert result.exit_code == (0 if same else 2)
        shutil.rmtree(place / "out", ignore_errors=True)
    assert everything(place) == outside

"""What is done to valid text, bytes, documents and archives: seeded, and of every kind."""

from __future__ import annotations

import copy
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "ran"
"""The file, in the folder to work in, that code out of an input would make."""

CODE = [
    f"__import__('pathlib').Path({MARK!r}).touch()",
    f"open({MARK!r}, 'w').close()",
    f"$(touch {MARK})",
    f"`touch {MARK}`",
    f"; touch {MARK} #",
    f"!!python/object/apply:os.system ['touch {MARK}']",
    f"{{{{ open({MARK!r}, 'w') }}}}",
    f"torch.nn.SiLU(open({MARK!r}, 'w'))",
]
PATHS = [
    "../../out-of-here", "/etc/passwd", "/dev/zero", "/dev/stdin", "..", ".", "/", "~",
    "~no-such-user/x", "[/b]x", "[red]x[/]", "a\x1b[2Jb", "a\rb",
    "a/../../b", "..\\..\\b", "C:\\b", "file:///etc/passwd", "https://example.com/x.pt", "con",
    "x" * 300, "x/" * 3000, "images/../../b", "\0", "-", "--help", "*", "a@b@c",
]  # fmt: skip
DOTTED = [
    "os.system", "builtins.eval", "torch.hub.load", "subprocess.Popen", "pathlib.Path",
    "mmengine.fileio.load", "torch.nn.Module", "nn.modules.module.Module", "torch.load",
    "importlib.import_module", "__builtins__", "mmdet.apis.init_detector", "dfq.cli.main.main",
]  # fmt: skip
NUMBERS: list[Any] = [
    float("nan"), float("inf"), float("-inf"), 10**400, -(10**400), 2**63, -(2**63) - 1, 2**31,
    1e308, 5e-324, -1, 0, -0.0, 0.5, 10**9,
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, "", "abc", "7", "nan", "9" * 5000, "\ud800", "a\nb", "\x1b[31m", "x" * 5000,
    [], {}, [1], {"a": 1}, [[[]]], [None], {"type": "dict"},
]  # fmt: skip
"""What no field expects."""


def ways(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within a document."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    below = [way for key, one in pairs for way in ways(one, (*above, key))]
    return [above, *below] if above else below


def at(document: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        document = document[key]
    return document


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def odd_value(draw: random.Random) -> Any:
    """Any value that does not belong; of several kinds, each as likely."""
    kinds: list[Callable[[], Any]] = [
        lambda: draw.choice(ODD),
        lambda: draw.choice(NUMBERS),
        lambda: draw.choice(CODE),
        lambda: draw.choice(PATHS),
        lambda: draw.choice(DOTTED),
        lambda: nested(draw.choice([5, 70, 200])),
        lambda: [0] * draw.choice([3, 2000]),
    ]
    return draw.choice(kinds)()


def mutate_tree(document: Any, draw: random.Random, times: int = 1) -> tuple[Any, str]:
    """A copy of a document with some values changed, and what was done."""
    document = copy.deepcopy(document)
    done = []
    for _ in range(times):
        known = ways(document)
        if not known:
            break
        way = draw.choice(known)
        place, last = at(document, way[:-1]), way[-1]
        what = draw.choice(["value", "value", "value", "remove", "repeat", "swap", "name", "sign"])
        if what == "remove":
            del place[last]
        elif what == "repeat":
            place[last] = [copy.deepcopy(place[last])] * 3
        elif what == "swap":
            place[last] = copy.deepcopy(at(document, draw.choice(known)))
        elif what == "name" and isinstance(place, dict):
            place[f"{last}{draw.choice(['s', ' ', '_', '.x'])}"] = place.pop(last)
        elif what == "sign" and type(place[last]) in (int, float):
            place[last] = draw.choice([-place[last], place[last] + 1, place[last] * 1000])
        else:
            place[last] = odd_value(draw)
        done.append(f"{what} at {'.'.join(map(str, way))}")
    return document, ", ".join(done)


def with_key_twice(text: str, draw: random.Random) -> str:
    """A JSON text in which a key of an object is there twice; its second value is another."""
    document = json.loads(text)
    objects = [(), *ways(document)]
    objects = [way for way in objects if isinstance(at(document, way), dict) and at(document, way)]
    place = at(document, draw.choice(objects))
    place["@@"] = odd_value(random.Random(draw.random()))
    twice = draw.choice([key for key in place if key != "@@"])
    return json.dumps(document).replace('"@@"', json.dumps(twice))


def mutate_bytes(data: bytes, draw: random.Random, within: int | None = None) -> bytes:
    """Change, insert, remove or repeat some bytes.

    Args:
        data: what is damaged.
        within: only before this offset; None: anywhere.
    """
    found = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 20])):
        size = max(1, min(len(found), within or len(found)))
        place, what = draw.randrange(size), draw.random()
        if what < 0.5 and found:
            found[place] ^= 1 << draw.randrange(8)
        elif what < 0.6 and found:
            found[place] = draw.randrange(256)
        elif what < 0.75:
            found[place:place] = draw.randbytes(draw.randrange(1, 9))
        elif what < 0.9:
            del found[place : place + draw.randrange(1, 30)]
        else:
            found[place:place] = found[: draw.randrange(1, 50)]
    return bytes(found)


def flipped(data: bytes, draw: random.Random, start: int = 0) -> bytes:
    """One bit is another, behind `start`."""
    found = bytearray(data)
    found[draw.randrange(start, len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.choice([0, 1, 8, len(data) // 2, len(data) - 1, draw.randrange(len(data))])]


# --- safetensors


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a `.safetensors` file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: dict[str, Any] | str, payload: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + payload


# --- archives of torch


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def write_records(path: Path, content: dict[str, bytes]) -> None:
    """An archive as torch reads it, with right checksums."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def evil_pickle(draw: random.Random) -> bytes:
    """A pickle that makes `MARK` where it is loaded without restrictions."""
    command, line = f"touch {MARK}", f"open({MARK!r},'w').close()"

    class Reduced:
        def __reduce__(self) -> Any:
            import os

            return draw.choice([(os.system, (command,)), (exec, (line,)), (eval, (line,))])

    forms: list[Callable[[], bytes]] = [
        lambda: pickle.dumps(Reduced(), protocol=draw.randrange(6)),
        lambda: pickle.dumps({"model": Reduced()}, protocol=draw.choice([2, 4])),
        lambda: pickle.dumps([1, Reduced()], protocol=2),
        lambda: b"cos\nsystem\n(" + _text(command) + b"tR.",
        lambda: b"(" + _text(command) + b"ios\nsystem\n.",
        lambda: b"(cposix\nsystem\n" + _text(command) + b"o.",
        lambda: b"\x80\x04" + _text("os") + _text("system") + b"\x93" + _text(command) + b"\x85R.",
        lambda: b"c__builtin__\ngetattr\n(cos\npath\n" + _text("os") + b"tR.",
        lambda: (
            b"cbuiltins\ngetattr\n(ctorch.nn\nModule\n" + _text("__init__.__globals__") + b"tR."
        ),
        lambda: b"ctorch.hub\nload\n(" + _text("x/y") + _text("z") + b"tR.",
        lambda: b"cpathlib\nPath\n(" + _text(MARK) + b"tR" + _text("x") + b"b.",
        lambda: b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\n" + _text(command) + b"tR.",
    ]
    return draw.choice(forms)()


def bomb_pickle(draw: random.Random) -> bytes:
    """A pickle that is small and stands for much, or that ends Python's stack."""
    forms: list[Callable[[], bytes]] = [
        lambda: b"(" * 50_000 + b"l" * 50_000 + b".",
        lambda: b"\x80\x02]q\x00" + b"".join(
            b"]q" + bytes([n + 1]) + b"(" + 2 * (b"h" + bytes([n])) + b"e" for n in range(60)
        ) + b".",
        lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
        lambda: b"\x80\x02}q\x00(" + _text("a") + b"h\x00u.",
        lambda: b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"1.",
        lambda: b"N" * 100 + b".",
        lambda: b"h\xff.",
        lambda: b"",
    ]  # fmt: skip
    return draw.choice(forms)()


def zip_bomb(path: Path) -> None:
    """A small archive that unpacks to hundreds of megabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N.")
        with archive.open("archive/data/0", "w", force_zip64=True) as file:
            for _ in range(20):
                file.write(bytes(1 << 24))

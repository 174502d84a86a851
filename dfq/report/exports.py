"""What was found of a run's exported files: `exports/*.verify.json` beside the run, as far as it
goes. Whatever a file does not say, or says in another form than is known here, is None or empty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runtime.files import read_json
from ..runtime.plain import plain_tree

FOLDER, SUFFIX = "exports", ".verify.json"

MOST = 64
"""Files that are read."""


@dataclass(frozen=True)
class Parity:
    """How far one output is from the network's own, in quantization steps."""

    output: str
    step: float | None
    max_steps: float | None
    mean_steps: float | None
    share_within_one: float | None


@dataclass(frozen=True)
class Latency:
    """Milliseconds an image, of the float network's file and of this one."""

    image_size: float | None
    threads: float | None
    float_ms: float | None
    file_ms: float | None
    ratio: float | None


@dataclass(frozen=True)
class FloatOperation:
    """An operation that the runtime computes in float."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class Export:
    """One exported file, and what was found of it.

    Attributes:
        source: name of the JSON file that says so.
        file, format, runtime, precision: of the exported file.
        size_bytes: of the exported file.
        parity: by output.
        integer_share: of the MACs that the runtime computes in integers, in [0, 1].
        counted_from: how that was found.
        float_operations: what it computes in float.
        latency: by image size and threads.
        AP, float_AP, top1, float_top1, accuracy_data: of the file and of the float network,
            fractions in [0, 1], and on what.
        threshold_float, threshold: a score threshold of the float network, and the one of this file
            that goes with it.
        faults: what is wrong with it, a line each.
        command: that repeats all this.
    """

    source: str
    file: str | None = None
    format: str | None = None
    runtime: str | None = None
    precision: str | None = None
    size_bytes: float | None = None
    parity: list[Parity] = field(default_factory=list)
    integer_share: float | None = None
    counted_from: str | None = None
    float_operations: list[FloatOperation] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    AP: float | None = None
    float_AP: float | None = None
    top1: float | None = None
    float_top1: float | None = None
    accuracy_data: str | None = None
    threshold_float: float | None = None
    threshold: float | None = None
    faults: list[str] = field(default_factory=list)
    command: str | None = None


def read_exports(run: Path) -> tuple[list[Export], list[str]]:
    """What is known of the exported files of a run.

    Args:
        run: its folder.

    Returns:
        One for each file that says something, by its name; and a line for each that cannot be read.
    """
    folder = run / FOLDER
    try:
        names = sorted(path.name for path in folder.iterdir() if path.name.endswith(SUFFIX))
    except OSError:
        return [], []
    exports, problems = [], []
    for name in names[:MOST]:
        try:
            content = plain_tree(read_json(folder / name), name)
        except (UserError, OSError) as error:
            # Its folder is another for everybody.
            problem = str(error).removeprefix(f"{folder / name}: ").removeprefix(f"{name}: ")
            problems.append(f"{FOLDER}/{name}: {problem}")
            continue
        if isinstance(content, dict):
            exports.append(parse(content, name))
        else:
            problems.append(f"{FOLDER}/{name}: not as dfq wrote it")
    if len(names) > MOST:
        problems.append(f"{FOLDER}: {len(names) - MOST} of {len(names)} files were not read")
    return exports, problems


def parse(content: Mapping[str, Any], source: str) -> Export:
    """An `Export` from plain values; fields that are missing are None or empty."""
    integers, accuracy, threshold = (
        _mapping(content.get(key)) for key in ("integers", "accuracy", "threshold")
    )
    outputs = _mapping(_mapping(content.get("parity")).get("outputs"))
    return Export(
        source=source,
        file=_text(content.get("file")),
        format=_text(content.get("format")),
        runtime=_text(content.get("runtime")),
        precision=_text(content.get("precision")),
        size_bytes=_number(content.get("size_bytes")),
        parity=[_parity(name, _mapping(values)) for name, values in sorted(outputs.items())],
        integer_share=_number(integers.get("share_of_macs")),
        counted_from=_text(integers.get("counted_from")),
        float_operations=[
            FloatOperation(*(_text(operation.get(key)) or "" for key in ("name", "type", "reason")))
            for operation in map(_mapping, _list(integers.get("float_operations")))
        ],
        latency=[
            Latency(
                *(
                    _number(measurement.get(key))
                    for key in ("image_size", "threads", "float_ms", "file_ms", "ratio")
                )
            )
            for measurement in map(_mapping, _list(content.get("latency")))
        ],
        AP=_number(accuracy.get("AP")),
        float_AP=_number(accuracy.get("float_AP")),
        top1=_number(accuracy.get("top1")),
        float_top1=_number(accuracy.get("float_top1")),
        accuracy_data=_text(accuracy.get("data")),
        threshold_float=_number(threshold.get("float")),
        threshold=_number(threshold.get("this")),
        faults=[text for fault in _list(content.get("faults")) if (text := _text(fault))],
        command=_text(content.get("command")),
    )


def _parity(name: str, values: Mapping[str, Any]) -> Parity:
    keys = ("step", "max_steps", "mean_steps", "share_within_one")
    return Parity(name, *(_number(values.get(key)) for key in keys))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)

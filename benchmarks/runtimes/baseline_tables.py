"""The tables of the benchmark against runtimes' own quantizers, and where it ran."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""Of the CPU, as Linux names them: what integer and bfloat16 kernels are chosen by."""

PACKAGES = ("onnxruntime", "openvino", "nncf", "ultralytics", "torch")


def surroundings() -> list[str]:
    """The CPU, those of its instructions that matter, and versions."""
    model, flags = platform.processor(), set[str]()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        if key.strip() == "flags":
            flags = set(value.split())
    has, lacks = ([flag for flag in FLAGS if (flag in flags) is there] for there in (True, False))
    return [
        f"CPU: {model}, with {', '.join(has) or 'none'}, without {', '.join(lacks) or 'none'}.",
        "Versions: " + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + ".",
    ]


def report(rows: Sequence[Row], sets: Sequence[str], sides: Sequence[int]) -> list[str]:
    """Markdown of the results of one bench.

    Args:
        rows: of its results.
        sets: names, in order.
        sides: pixels that files were timed at.
    """
    times = {
        (row["runtime"], row["size"]): row["files"] for row in rows if row["kind"] == "latency"
    }
    heads = [f"CPU time of float, {side} px" for side in sides]
    lines = [
        f"| runtime | file | calibrated on | images | AP | change, 95 % | kept | "
        f"{' | '.join(heads)} | size |",
        f"| --- | --- | --- | ---: | ---: | --- | ---: |{' ---: |' * (len(sides) + 1)}",
    ]
    accuracies = [row for row in rows if row["kind"] == "AP"]
    whole = {row["runtime"]: row["AP"] for row in accuracies if row["tool"] == "float"}
    for row in accuracies:
        if row["set"] is not None and row["set"] not in sets:
            continue
        change = "–" if row["change"] is None else "{:+.3f} to {:+.3f}".format(*row["change"])
        reference = whole[row["runtime"]]
        kept = f"{row['AP'] / reference:.1%}" if reference > 0 else "–"
        ratios = [_ratio(times.get((row["runtime"], side)), row["tool"]) for side in sides]
        lines.append(
            f"| {row['runtime']} | {row['tool']} | {row['set'] or '–'} | {row['images'] or '–'} | "
            f"{row['AP']:.4f} | {change} | {kept} | {' | '.join(ratios)} | "
            f"{row['bytes'] / 1e6:.2f} MB |"
        )
    lines += [
        "",
        "| runtime | px | file | CPU ms | of float | of the runtime's own | wall ms | of float | "
        "of the runtime's own |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (runtime, side), files in times.items():
        if side in sides:
            lines += [
                f"| {runtime} | {side} | {tool} | {_times(one['cpu'])} | {_times(one['wall'])} |"
                for tool, one in files.items()
            ]
    return lines


def _ratio(files: dict[str, Row] | None, tool: str) -> str:
    return "–" if files is None or tool not in files else f"{files[tool]['cpu']['of_float']:.2f}"


def _times(one: dict[str, float]) -> str:
    return f"{one['ms']:.2f} | {one['of_float']:.2f} | {one['of_static']:.2f}"

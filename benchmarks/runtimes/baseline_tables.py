"""The tables of the benchmark against runtimes' own quantizers, and where it ran."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.common import Row, header, line

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""Of the CPU, as Linux names them: what integer and bfloat16 kernels are chosen by."""

PACKAGES = ("onnxruntime", "openvino", "nncf", "ultralytics", "torch")


def surroundings() -> list[str]:
    """The CPU, those of its instructions that matter, and versions."""
    model, flags = platform.processor(), set[str]()
    info = Path("/proc/cpuinfo")
    for entry in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = entry.partition(":")
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
    columns = ["calibrated on", "images:", "AP:", "change, 95 %", "kept:"]
    columns += [f"CPU time of float, {side} px:" for side in sides]
    lines = header("runtime", "file", *columns, "size:").splitlines()
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
            line(
                row["runtime"],
                row["tool"],
                row["set"] or "–",
                row["images"] or "–",
                f"{row['AP']:.4f}",
                change,
                kept,
                *ratios,
                f"{row['bytes'] / 1e6:.2f} MB",
            )
        )
    clocks = [
        column
        for clock in ("CPU", "wall")
        for column in (f"{clock} ms:", "of float:", "of the runtime's own:")
    ]
    lines += ["", header("runtime", "px:", "file", *clocks)]
    for (runtime, side), files in times.items():
        if side in sides:
            lines += [
                line(runtime, side, tool, *_times(times_of["cpu"]), *_times(times_of["wall"]))
                for tool, times_of in files.items()
            ]
    return lines


def _ratio(files: dict[str, Row] | None, tool: str) -> str:
    return "–" if files is None or tool not in files else f"{files[tool]['cpu']['of_float']:.2f}"


def _times(found: dict[str, float]) -> list[str]:
    return [f"{found[key]:.2f}" for key in ("ms", "of_float", "of_static")]

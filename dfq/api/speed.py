"""What integers are worth in a runtime, on this machine: a file's time beside the float one's."""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError, argument, shown
from ..export.exported import RUNTIMES
from ..export.latency import Latency, in_turns
from ..export.opened import open_exported
from ..export.opening import OpenVinoFile, is_exported, open_file
from ..graph.fold_batchnorm import fold
from ..models import from_spec
from ..models.base import Model
from ..runs.folder import is_run, load_run
from ..runtime.files import user_path
from ..runtime.surroundings import Report, reporter
from .export import export

SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml", "litert": ".tflite"}
"""Of files that are timed in a runtime that runs here."""

WORTH_IT = 0.95
"""A file that takes this share of the float one's time, or more, is not called faster."""


@dataclass(frozen=True)
class Speed:
    """How long a file takes beside the float one.

    Attributes:
        runtime: that executed both.
        rows: one for each number of threads.
        bfloat16: the same of the *float* file computed in bfloat16, where the runtime does so at
            the user's word.
    """

    runtime: str
    rows: Sequence[Latency]
    bfloat16: Sequence[Latency] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        return {
            "runtime": self.runtime,
            "latency": [_row(row) for row in self.rows],
            "float_in_bfloat16": [_row(row) for row in self.bfloat16],
            "cores": os.cpu_count(),
            "said": self.said(),
        }

    def table(self) -> list[str]:
        """A line for each number of threads."""
        return [_line(f"{self.runtime}, {_threads(row)}", row) for row in self.rows] + [
            _line(f"the float file in bfloat16, {_threads(row)}", row) for row in self.bfloat16
        ]

    def said(self) -> list[str]:
        """What a user has to be told who thinks that integers are always faster."""
        lines = [
            f"not worth it here: with {_threads(row)} INT8 takes {row.ratio:.0%} of the float "
            f"file's time in {self.runtime} on this machine; it saves storage alone"
            for row in self.rows
            if row.ratio >= WORTH_IT
        ]
        for row, half in zip(self.rows, self.bfloat16, strict=False):
            if half.ratio < row.ratio:
                lines.append(
                    f"float in bfloat16 is faster here: {half.ratio:.0%} of the time of float32 "
                    f"with {_threads(row)}, INT8 {row.ratio:.0%} "
                    "(INFERENCE_PRECISION_HINT=bf16, of the float file)"
                )
        return lines


def _threads(row: Latency) -> str:
    if row.threads is None:
        return "all threads"
    return f"{row.threads} thread" + ("s" if row.threads > 1 else "")


def _line(label: str, row: Latency) -> str:
    return (
        f"{label}, {row.image_size} px: {row.file_ms:.2f} ms ({row.throughput:.0f} images/s), "
        f"float {row.reference_ms:.2f} ms; ratio {row.ratio:.2f}"
    )


def _row(row: Latency) -> dict[str, Any]:
    return {**row.to_dict(), "float_ms": row.reference_ms}


def compare_speed(file: Path, reference: Path, *, image_size: int, trust: bool = False) -> Speed:
    """Time a file against the float one, in turns, with one thread and with all.

    Args:
        file, reference: exported files of one format.
        image_size: side in pixels.
        trust: run what is in a `.pt2` file.

    Raises:
        UserError: a file cannot be opened.
    """
    images = np.random.default_rng(0).random((1, 3, image_size, image_size), dtype=np.float32)
    rows, halves = [], []
    runtime = ""
    for threads in (1, None):
        opened = [open_file(path, threads=threads, trust=trust) for path in (file, reference)]
        runtime = opened[0].runtime
        if runtime == "openvino":
            opened.append(OpenVinoFile(reference, threads, precision="bf16"))
        times = in_turns([functools.partial(runtime_file.run, images) for runtime_file in opened])
        rows.append(_latency(image_size, threads, times[0], times[1]))
        if len(times) > 2:
            halves.append(_latency(image_size, threads, times[2], times[1]))
    return Speed(runtime, rows, halves)


def _latency(
    side: int, threads: int | None, ours: Sequence[float], theirs: Sequence[float]
) -> Latency:
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Latency(
        side, threads, statistics.median(theirs) * 1e3, statistics.median(ours) * 1e3, ratio
    )


def measure(
    model: str | Path,
    *,
    runtime: str | None = None,
    image_size: int | None = None,
    trust: bool = False,
    progress: Report = None,
) -> Speed:
    """Time a run or an exported file against the same network in float; what takes its time is
    written for it to a temporary folder, and is gone afterwards.

    Args:
        model: a run folder, or an exported file of a quantized network.
        runtime: one of `SUFFIXES`; None: the file's, and onnxruntime for a run.
        image_size: side in pixels; None: the network's own.
        trust: run what is in a `.pt2` file.
        progress: told how far it is.

    Raises:
        UserError: for anything the user can mend.
    """
    told = reporter(progress)
    path = user_path(model)
    if runtime is not None and runtime not in SUFFIXES:
        raise UserError(
            f"{argument('runtime', runtime)}: is not run here; {', '.join(SUFFIXES)} are"
        )
    with tempfile.TemporaryDirectory(prefix="dfq-") as folder:
        place = Path(folder)
        if is_exported(path):
            opened = open_exported(path, trust=trust)
            if runtime is not None and path.suffix.lower() != SUFFIXES[runtime]:
                raise UserError(
                    f"{argument('runtime', runtime)}: does not open {shown(path)} here; leave it "
                    "out, or give the run that it was exported from"
                )
            if opened.info.weight_bits >= 32:
                raise UserError(
                    f"{shown(path)}: is a float file, and nothing to compare with; give the "
                    "quantized one"
                )
            size = image_size or opened.image_size
            opened.check_size(size, "--image-size")
            side = opened.image_size
            batch = None if opened.info.batch is None else 1
            network, file = fold(from_spec(opened.info.spec)), path
            if opened.info.batch not in (None, 1):
                raise UserError(
                    f"{shown(path)}: takes {opened.info.batch} images a call; a file of one, or of "
                    "any number, is timed"
                )
        elif is_run(path):
            runtime = runtime or "onnxruntime"
            student = load_run(path)
            size = side = image_size or student.image_size
            student.check_size(size, "--image-size")
            network, batch = as_float(student), 1
            file = export(
                path, place / f"int8{SUFFIXES[runtime]}", format=_format(runtime), runtime=runtime,
                image_size=size, progress=told,
            )  # fmt: skip
        else:
            raise UserError(
                f"{shown(model)}: --measure takes a run or an exported file; make a run with dfq "
                "qat, or all at once with dfq deploy"
            )
        suffix = file.suffix.lower()
        reference = export(
            network, place / f"float{suffix}", format=_format_of(suffix), image_size=side,
            batch=batch, progress=told,
        )  # fmt: skip
        return compare_speed(file, reference, image_size=size, trust=trust)


def _format(runtime: str) -> str:
    return _format_of(SUFFIXES[runtime])


def _format_of(suffix: str) -> str:
    formats = {".onnx": "onnx", ".xml": "openvino", ".tflite": "litert", ".pt2": "torch"}
    assert set(formats.values()) == set(RUNTIMES)
    return formats[suffix]


@torch.no_grad()
def as_float(student: Model) -> Model:
    """The network of a quantized one, folded, with its weights and without its quantizers: as fast
    as the float network that it was made from."""
    made = fold(from_spec(student.spec()))
    state = student.module.state_dict()
    for name, tensor in made.module.state_dict().items():
        if name in state and state[name].shape == tensor.shape:
            tensor.copy_(state[name])
    return made

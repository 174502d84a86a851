"""Ours against what runtimes quantize by themselves, through the runtimes.

    python -m benchmarks.runtimes.baselines --model yolov5n.pt --data coco-val \\
      --set noise=DIR --set synthetic=DIR --set photos=coco-train --first photos=64 \\
      --ours synthetic --out runs/baselines

The float network is exported for onnxruntime and for OpenVINO, images in, boxes and scores out.
Quantized are it, by each runtime's own tools on each set (decoding, which is after the last
convolution, stays in float, as in ours), and the network by dfq without training, on one of the
sets. Printed are AP through the runtime, its change from the float file in the same runtime (95 %
interval of a paired bootstrap over the images), size, and time beside the float file, in turns:
both by the clock and as the processor's own time.

What is made and measured stays in the output folder, is written at once, and is not made again.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.common import (
    Row,
    benchmark,
    model_option,
    out_option,
    pairs,
    results,
    threads_option,
)
from benchmarks.runtimes.baseline_files import (
    DYNAMIC,
    FLOAT,
    MIXED,
    OURS,
    STATIC,
    SUFFIXES,
    ULTRALYTICS,
    Files,
    Settings,
)
from benchmarks.runtimes.baseline_tables import report, surroundings
from benchmarks.runtimes.runtime_tools import bytes_of
from dfq.data.readers import open_set
from dfq.errors import UserError, shown
from dfq.evaluation.agreement import pseudo_labelled
from dfq.evaluation.bootstrap import bootstrap_difference
from dfq.evaluation.coco import predict, score
from dfq.export.latency import ROUNDS, in_turns
from dfq.export.opening import OpenVinoFile, RuntimeFile, open_file
from dfq.models import load_detector
from dfq.models.base import Detections, Detector
from dfq.models.detecting import Task
from dfq.runtime.files import append_line, write_atomic

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""The first also counts what others do on the same cores, the second only the runtime itself."""


class Through:
    """A file as what detects: the detector decodes what the file gives."""

    task: Task = "detection"

    def __init__(self, file: RuntimeFile, detector: Detector) -> None:
        self.file, self.detector = file, detector
        self.names, self.image_size = detector.names, detector.image_size
        self.stride, self.source = detector.stride, str(file.path)
        self.device, self.has_masks = torch.device("cpu"), False
        self.fixed_batch = None

    def check_size(self, size: int, key: str = "image size") -> None:
        self.detector.check_size(size, key)

    def detect(self, images: Tensor, *, masks: bool = False, **thresholds: Any) -> list[Detections]:
        found = {
            name: torch.from_numpy(np.array(value))
            for name, value in self.file.run(images.numpy()).items()
        }
        if set(found) != {"boxes", "scores"} and len(found) == 1:
            found = split(*found.values())
        shape = (images.shape[2], images.shape[3])
        return self.detector.from_outputs(found, shape, **thresholds)


def split(one: Tensor) -> dict[str, Tensor]:
    """Ultralytics' one output `(n, 4 + categories, A)` of centres, sizes and scores, as ours."""
    centre, side, scores = one.mT.split([2, 2, one.shape[1] - 4], dim=2)
    return {"boxes": torch.cat([centre - side / 2, centre + side / 2], dim=2), "scores": scores}


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median of the turns' own ratios."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


class Bench:
    """All measurements."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.detector = load_detector(settings.model)
        self.files = Files(settings, self.detector)
        self.data = open_set(settings.data)
        self.ultralytics = (
            self.detector.family == "ultralytics" and Path(settings.model).suffix == ".pt"
        )

    def identity(self) -> Row:
        """Whatever else a result depends on."""
        settings = self.settings
        return {
            "fingerprint": self.detector.fingerprint,
            "data": settings.data,
            "size": settings.size,
            "threads": settings.threads,
            "overrides": list(settings.overrides),
            "against_float": settings.against_float,
        }

    def tools(self, runtime: str) -> list[tuple[str, bool]]:
        """Tools of a runtime, and whether they calibrate on sets of all kinds."""
        found = [(FLOAT, False), (OURS, False)]
        if self.settings.mixed is not None:
            found.append((MIXED, False))
        if runtime == "onnxruntime":
            found.append((DYNAMIC, False))
        found.append((STATIC[runtime], True))
        if runtime == "OpenVINO" and self.ultralytics:
            found.append((ULTRALYTICS, True))
        return found

    def settle(self) -> None:
        """Note what files are made from; files of one name are of one making.

        Raises:
            UserError: files are there that were made from something else.
        """
        settings, path = self.settings, self.settings.out / "settings.json"
        own: dict[str, Any] = {
            "model": self.detector.fingerprint,
            "--data": settings.data,
            "--ours": settings.ours,
            "--override": list(settings.overrides),
        }
        own |= {
            f"--set {name}": [source, settings.first.get(name)]
            for name, source in settings.sets.items()
        }
        if settings.mixed is not None:
            own["--mixed"] = settings.mixed
        there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for key, value in own.items():
            if there.get(key, value) != value:
                raise UserError(
                    f"--out {shown(settings.out)}: its files are of another {key}; name another one"
                )
        if {**there, **own} != there:
            write_atomic(path, json.dumps({**there, **own}, indent=1).encode())

    def known(self) -> list[Row]:
        identity = self.identity()
        return [row for row in results(self.settings.results) if row["identity"] == identity]

    def write(self, row: Row) -> None:
        row["identity"] = self.identity()
        append_line(self.settings.results, json.dumps(row))

    @functools.lru_cache  # noqa: B019
    def _detections(self, path: Path) -> list[Detections]:
        through = Through(open_file(path, threads=self.settings.threads), self.detector)
        return predict(through, self.data, image_size=self.settings.size, batch_size=1)

    def accuracy(self, runtime: str) -> None:
        """AP of each file of a runtime that is not measured yet."""
        sets, size = self.settings.sets, self.settings.size
        done = {
            (row["tool"], row["set"])
            for row in self.known()
            if row["kind"] == "AP" and row["runtime"] == runtime
        }
        wanted = [
            (tool, name)
            for tool, calibrated in self.tools(runtime)
            for name in (sets if calibrated else [None])
        ]
        for tool, name in wanted:
            on = self.settings.ours if tool == OURS else name
            if (tool, on) in done:
                continue
            path = self.files.at(runtime, tool, name, size)
            before = self._detections(self.files.at(runtime, FLOAT, None, size))
            found = self._detections(path)
            data, names = self.data, self.detector.names
            if self.settings.against_float:
                data = pseudo_labelled(self.data, before, len(names))
                names = data.names
            row: Row = {"kind": "AP", "runtime": runtime, "tool": tool, "set": on}
            row["images"] = len(self.files.images(on)) if on else None
            row["AP"] = score(data, found, names).AP
            row["change"] = None
            if tool != FLOAT:
                row["change"] = list(bootstrap_difference(data, found, before, names))
            row["bytes"] = bytes_of(path)
            self.write(row)
            click.echo(f"{runtime}, {tool}, {on or '-'}: AP {row['AP']:.4f}", err=True)

    def latency(self, runtime: str, size: int) -> None:
        """Times of all files of a runtime, in turns within one run, if it is not there yet."""
        if any(
            row["kind"] == "latency" and (row["runtime"], row["size"]) == (runtime, size)
            for row in self.known()
        ):
            return
        opened: dict[str, RuntimeFile] = {}
        threads = self.settings.threads
        for tool, calibrated in self.tools(runtime):
            at_hand = calibrated and size == self.settings.size
            name = next(iter(self.settings.sets)) if at_hand else None
            path = self.files.at(runtime, tool, name, size)
            opened[tool] = open_file(path, threads=threads)
            if tool == FLOAT and runtime == "OpenVINO":
                opened["float, bfloat16"] = OpenVinoFile(path, threads, precision="bf16")
        images = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
        calls: list[Callable[[], object]] = [
            functools.partial(file.run, images) for file in opened.values()
        ]
        row: Row = {"kind": "latency", "runtime": runtime, "size": size}
        row |= {"load": os.getloadavg()[0], "rounds": self.settings.rounds}
        row["files"] = {tool: {} for tool in opened}
        for key, clock in CLOCKS.items():
            turns = in_turns(calls, rounds=self.settings.rounds, clock=clock)
            times = dict(zip(opened, turns, strict=True))
            for tool, own in times.items():
                row["files"][tool][key] = {
                    "ms": statistics.median(own) * 1e3,
                    "of_float": ratio(own, times[FLOAT]),
                    "of_static": ratio(own, times[STATIC[runtime]]),
                }
        self.write(row)
        click.echo(f"{runtime}, {size} px: timed", err=True)


@benchmark(__doc__)
@model_option
@click.option("--data", required=True, help="A set to measure on.")
@click.option("--against-float", is_flag=True, help="Its labels are the float network's boxes.")
@click.option("--size", default=320, show_default=True, help="Pixels, of AP.")
@click.option("--time-at", multiple=True, type=int, default=(320, 640), show_default=True)
@click.option("--set", "sets", multiple=True, required=True, help="NAME=SET to calibrate on.")
@click.option("--first", multiple=True, help="NAME=N: only so many images of that (real) set.")
@click.option("--ours", help="NAME of the set that dfq calibrates on.", show_default="the first")
@click.option("--mixed", help="A run of mixed bits.")
@threads_option
@click.option("--rounds", default=ROUNDS, show_default=True, help="Turns of each timed file.")
@click.option("--override", "overrides", multiple=True, help="KEY=VALUE for dfq's recipe.")
@out_option
def main(
    model: str,
    data: str,
    against_float: bool,
    size: int,
    time_at: Sequence[int],
    sets: Sequence[str],
    first: Sequence[str],
    ours: str | None,
    mixed: str | None,
    threads: int,
    rounds: int,
    overrides: tuple[str, ...],
    out: Path,
) -> None:
    torch.set_num_threads(threads)
    named = pairs(sets, "--set")
    numbers = {name: int(value) for name, value in pairs(first, "--first").items()}
    ours = ours or next(iter(named))
    for option, names in (("--ours", [ours]), ("--first", list(numbers))):
        for name in names:
            if name not in named:
                raise click.UsageError(f"{option} {name}: names none of the sets")
    settings = Settings(
        model, data, size, named, numbers, ours, mixed, threads, out, overrides, against_float,
        rounds,
    )  # fmt: skip
    bench = Bench(settings)
    out.mkdir(parents=True, exist_ok=True)
    bench.settle()
    for runtime in SUFFIXES:
        bench.accuracy(runtime)
    for side in time_at:
        for runtime in SUFFIXES:
            bench.latency(runtime, side)
    click.echo("\n".join(surroundings()))
    if not bench.ultralytics:
        click.echo(f"\n{ULTRALYTICS}: left out, Ultralytics reads no checkpoint of this kind.")
    click.echo()
    click.echo("\n".join(report(bench.known(), list(named), time_at)))


if __name__ == "__main__":
    main()

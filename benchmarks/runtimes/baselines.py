"""Ours against what runtimes quantize by themselves, through the runtimes.

    python benchmarks/runtimes/baselines.py --model yolov5n.pt --data coco-val \\
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
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from baseline_tables import report, surroundings
from onnxruntime.quantization.shape_inference import quant_pre_process
from runtime_tools import (
    Images,
    by_nncf,
    by_onnxruntime,
    by_onnxruntime_dynamic,
    bytes_of,
    decoding_of_onnx,
    decoding_of_openvino,
    images_of,
    pairs,
)
from torch import Tensor

import dfq
from dfq.dataset.readers import open_set
from dfq.detectors import load_detector
from dfq.detectors.base import Detections, Detector
from dfq.errors import UserError
from dfq.evaluation.agreement import pseudo_labelled
from dfq.evaluation.bootstrap import bootstrap_difference
from dfq.evaluation.coco import predict, score
from dfq.export.calibration_files import export_for
from dfq.export.latency import ROUNDS, in_turns
from dfq.export.opening import OpenVinoFile, RuntimeFile, open_file
from dfq.files import append_line

SUFFIXES = {"onnxruntime": ".onnx", "OpenVINO": ".xml"}
PLACED_FOR = {"onnxruntime": "onnxruntime", "OpenVINO": "openvino"}

IMAGES_FOR_TIMING = 8
"""What a file is calibrated on that is timed alone: ranges do not change what it computes."""

FLOAT = "float"
DYNAMIC = "quantize_dynamic"
ULTRALYTICS = "Ultralytics INT8"
STATIC = {"onnxruntime": "quantize_static", "OpenVINO": "NNCF"}
OURS = "ours W8A8"
MIXED = "ours mixed"

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""The first also counts what others do on the same cores, the second only the runtime itself."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is the same for all files.

    Attributes:
        model, data: what is quantized, and the set that it is measured on.
        size: side in pixels that AP is measured at.
        sets: what to calibrate on, by name.
        first: of how many images, where not all.
        ours: name of the set that dfq calibrates on.
        mixed: a run of mixed bits.
        threads: of runtimes.
        out: folder of all that is made.
        overrides: changes to dfq's recipe.
        against_float: AP against the float network's own detections, not against labels.
        rounds: turns of each file that is timed.
    """

    model: str
    data: str
    size: int
    sets: Mapping[str, str]
    first: Mapping[str, int]
    ours: str
    mixed: str | None
    threads: int
    out: Path
    overrides: tuple[str, ...] = ()
    against_float: bool = False
    rounds: int = ROUNDS

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"


class Files:
    """The files, made when they are asked for and only once."""

    def __init__(self, settings: Settings, detector: Detector) -> None:
        self.settings, self.detector = settings, detector

    def images(self, name: str) -> Images:
        return images_of(self.settings.sets[name], self.settings.first.get(name))

    def at(self, runtime: str, tool: str, name: str | None, size: int) -> Path:
        """The file of a runtime by a tool, calibrated on a set; None: any few images, for a file
        that is only timed."""
        folder = self.settings.out / "files"
        folder.mkdir(parents=True, exist_ok=True)
        stem = "-".join([runtime, tool.replace(" ", "-"), *([name] if name else []), str(size)])
        path = folder / (stem + SUFFIXES[runtime])
        if not path.is_file():
            # Under another name until it is whole.
            made = self._make(runtime, tool, name, size, folder / f"{path.stem}.part{path.suffix}")
            if path.suffix == ".xml":
                made.with_suffix(".bin").replace(path.with_suffix(".bin"))
            made.replace(path)
        return path

    def _make(self, runtime: str, tool: str, name: str | None, size: int, out: Path) -> Path:
        if tool == FLOAT:
            return dfq.export(self.settings.model, out, image_size=size)
        if tool in (OURS, MIXED):
            run, data = self._run(runtime), self.settings.sets[self.settings.ours]
            if tool == MIXED:
                assert self.settings.mixed is not None
                run = Path(self.settings.mixed)
            return dfq.export(run, out, image_size=size, data=data)
        whole = self.at(runtime, FLOAT, None, size)
        if tool == DYNAMIC:
            return by_onnxruntime_dynamic(whole, out, decoding_of_onnx(whole))
        images = self.images(name) if name else open_set(self.settings.data)
        if name is None:
            images = images.head(IMAGES_FOR_TIMING)
        if tool == ULTRALYTICS:
            return self._by_ultralytics(images, size, out)
        if runtime == "OpenVINO":
            return by_nncf(whole, images, size, out, decoding_of_openvino(whole))
        ready = out.with_suffix(".ready.onnx")
        quant_pre_process(str(whole), str(ready), skip_symbolic_shape=True)
        made = by_onnxruntime(ready, images, size, out, decoding_of_onnx(ready))
        ready.unlink()
        return made

    def _run(self, runtime: str) -> Path:
        placed = PLACED_FOR[runtime]
        return dfq.quantize(
            "w8a8",
            model=self.settings.model,
            data=self.settings.sets[self.settings.ours],
            out=self.settings.out / "runs" / placed,
            overrides=[
                "method=ptq", "quantization.placement=qdq", f"quantization.runtime={placed}",
                *self.settings.overrides,
            ],
        )  # fmt: skip

    def _by_ultralytics(self, images: Images, size: int, out: Path) -> Path:
        """`yolo export format=openvino quantize=8`, which writes beside its checkpoint."""
        from ultralytics import YOLO

        folder = out.with_suffix(".ultralytics")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        checkpoint = shutil.copy(self.settings.model, folder / "model.pt")
        data, _, _ = export_for("ultralytics", images, folder / "set", size)
        made = YOLO(checkpoint).export(
            format="openvino", quantize=8, imgsz=size, data=str(data), batch=1
        )
        xml = next(Path(made).glob("*.xml"))
        xml.with_suffix(".bin").replace(out.with_suffix(".bin"))
        xml.replace(out)
        shutil.rmtree(folder)
        return out


class Through:
    """A file as what detects: the detector decodes what the file gives."""

    def __init__(self, file: RuntimeFile, detector: Detector) -> None:
        self.file, self.detector = file, detector
        self.names, self.image_size = detector.names, detector.image_size
        self.stride, self.source = detector.stride, str(file.path)
        self.device, self.has_masks = torch.device("cpu"), False

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

    def known(self) -> list[Row]:
        path, identity = self.settings.results, self.identity()
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                # Cut short when the bench was stopped.
                continue
            if row["identity"] == identity:
                rows.append(row)
        return rows

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


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--model", required=True)
@click.option("--data", required=True, help="A set to measure on.")
@click.option("--against-float", is_flag=True, help="Its labels are the float network's boxes.")
@click.option("--size", default=320, show_default=True, help="Pixels, of AP.")
@click.option("--time-at", multiple=True, type=int, default=(320, 640), show_default=True)
@click.option("--set", "sets", multiple=True, required=True, help="NAME=SET to calibrate on.")
@click.option("--first", multiple=True, help="NAME=N: only so many images of that (real) set.")
@click.option("--ours", help="NAME of the set that dfq calibrates on.", show_default="the first")
@click.option("--mixed", help="A run of mixed bits.")
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=ROUNDS, show_default=True, help="Turns of each timed file.")
@click.option("--override", "overrides", multiple=True, help="KEY=VALUE for dfq's recipe.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
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
    try:
        bench = Bench(settings)
        out.mkdir(parents=True, exist_ok=True)
        for runtime in SUFFIXES:
            bench.accuracy(runtime)
        for side in time_at:
            for runtime in SUFFIXES:
                bench.latency(runtime, side)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    click.echo("\n".join(surroundings()))
    if not bench.ultralytics:
        click.echo(f"\n{ULTRALYTICS}: left out, Ultralytics reads no checkpoint of this kind.")
    click.echo()
    click.echo("\n".join(report(bench.known(), list(named), time_at)))


if __name__ == "__main__":
    main()

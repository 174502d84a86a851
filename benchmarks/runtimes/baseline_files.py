"""The files that the benchmark against runtimes' own quantizers compares, each made once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxruntime.quantization.shape_inference import quant_pre_process

import dfq
from benchmarks.runtimes.runtime_tools import (
    Images,
    by_nncf,
    by_onnxruntime,
    by_onnxruntime_dynamic,
    decoding_of_onnx,
    decoding_of_openvino,
    images_of,
)
from dfq.data.readers import open_set
from dfq.export.calibration_files import export_for
from dfq.export.latency import ROUNDS
from dfq.models.base import Detector

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
        images = (
            open_set(self.settings.data).head(IMAGES_FOR_TIMING)
            if name is None
            else self.images(name)
        )
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

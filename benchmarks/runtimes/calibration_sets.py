"""What a calibration set is worth to the quantizers of onnxruntime and of NNCF (OpenVINO).

    python -m benchmarks.runtimes.calibration_sets --model yolov5n.pt --data coco-val \\
      --size 320 --set synthetic=DIR --set photos=coco-train --first photos=64 \\
      --out runs/calibration-sets

The network is exported to ONNX by PyTorch as far as its raw predictions, and quantized by each tool
on each set; detections are decoded from the raw predictions by PyTorch. Printed are AP, its change
from the float file and from the tool's file of the first set (95 % intervals of a paired bootstrap
over the images), and size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
import onnxruntime
import openvino
import torch
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from benchmarks.common import (
    benchmark,
    header,
    line,
    model_option,
    out_option,
    pairs,
    threads_option,
)
from benchmarks.runtimes.runtime_tools import (
    INPUT,
    by_nncf,
    by_onnxruntime,
    bytes_of,
    images_of,
)
from dfq.data.readers import open_set
from dfq.evaluation.bootstrap import bootstrap_difference
from dfq.evaluation.coco import predict, score
from dfq.models import load_detector
from dfq.models.base import Detections, Detector

Run = Callable[[np.ndarray], Sequence[np.ndarray]]


class Raw(nn.Module):
    """The network as far as its raw predictions, one tensor a level."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.network, self.detector = detector.module, detector

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.detector.raw(images))


def exported(detector: Detector, size: int, path: Path) -> Path:
    """The float network as an ONNX file of batch 1, ready for quantization."""
    images = torch.rand(1, 3, size, size)
    raw = detector.raw(images)
    if not (isinstance(raw, list) and all(isinstance(level, Tensor) for level in raw)):
        raise click.ClickException("only networks whose raw predictions are a list of tensors")
    program = torch.onnx.export(
        Raw(detector).eval(), (images,), dynamo=True, input_names=[INPUT], verbose=False
    )
    assert program is not None
    plain = path.with_suffix(".plain.onnx")
    program.save(plain)
    quant_pre_process(str(plain), str(path), skip_symbolic_shape=True)
    plain.unlink()
    return path


def opened(path: Path, threads: int) -> Run:
    """A file as a function of images `(1, 3, s, s)`."""
    if path.suffix == ".xml":
        properties = {"INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(str(path), "CPU", properties)
        return lambda images: list(compiled(images).values())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})


def through(detector: Detector, run: Run) -> Detector:
    """The detector, with the raw predictions that a file computes."""

    def raw(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(np.array(level)) for level in run(images.numpy())]

    found = detector.clone()
    found.raw = raw  # type: ignore[method-assign]
    return found


@benchmark(__doc__)
@model_option
@click.option("--data", required=True, help="A labelled set to measure on.")
@click.option("--size", default=320, show_default=True)
@click.option("--set", "sets", multiple=True, required=True, help="NAME=SET to calibrate on.")
@click.option("--first", multiple=True, help="NAME=N: only so many images of that (real) set.")
@threads_option
@out_option
def main(
    model: str,
    data: str,
    size: int,
    sets: Sequence[str],
    first: Sequence[str],
    threads: int,
    out: Path,
) -> None:
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    detector, real = load_detector(model), open_set(data)
    numbers = pairs(first, "--first")
    rows: list[dict[str, object]] = []

    def measured(path: Path) -> list[Detections]:
        return predict(
            through(detector, opened(path, threads)), real, image_size=size, batch_size=1
        )

    whole = exported(detector, size, out / "float.onnx")
    before = measured(whole)
    firsts: dict[str, list[Detections]] = {}

    def change(found: list[Detections], other: list[Detections]) -> tuple[str, list[float]]:
        low, high = bootstrap_difference(real, found, other, detector.names)
        return f"{low:+.3f} to {high:+.3f}", [low, high]

    def tell(tool: str, name: str, images: int, path: Path, seconds: float) -> None:
        found = before if path == whole else measured(path)
        ap = score(real, found, detector.names).AP
        from_float, between = change(found, before)
        from_first, of_first = change(found, firsts.setdefault(tool, found))
        rows.append(
            {
                "tool": tool,
                "set": name,
                "images": images,
                "AP": ap,
                "from_float": between,
                "from_first_set": of_first,
                "bytes": bytes_of(path),
                "seconds": seconds,
            }
        )
        print(
            line(
                tool,
                name,
                images,
                f"{ap:.3f}",
                from_float,
                from_first,
                f"{bytes_of(path) / 1e6:.2f} MB",
            ),
            flush=True,
        )

    columns = ("images:", "AP:", "from float", "from the first set", "size:")
    print(header("tool", "calibrated on", *columns))
    tell("float", "-", 0, whole, 0.0)
    for name, source in pairs(sets, "--set").items():
        chosen = images_of(source, int(numbers[name]) if name in numbers else None)
        for tool, quantize in (("onnxruntime", by_onnxruntime), ("NNCF", by_nncf)):
            start = time.perf_counter()
            path = quantize(whole, chosen, size, out / f"{tool}-{name}")
            taken = time.perf_counter() - start
            tell(tool, name, len(chosen), path, taken)
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Float, min-max baselines and zero-shot QAT of one detector, measured on real images.

    python -m benchmarks.accuracy.zero_shot --model yolov5n.pt --train coco-train --val coco-val \\
      --out bench

Everything it makes stays in the output folder: an interrupted bench goes on where it was. Prints a
Markdown table with bootstrap intervals over the validation images; the training never sees them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.common import benchmark, header, line, model_option, out_option, set_option
from dfq.api.quantize import quantize
from dfq.api.synthesize import synthesize
from dfq.data.calibration_set import CalibrationSet
from dfq.data.readers import open_set
from dfq.evaluation.coco import bootstrap_ap, predict, score
from dfq.models import require_detector
from dfq.recipe import load_recipe
from dfq.runs.loading import load_model
from dfq.runtime.progress import Live

# As it was before there were better ways: weights symmetric, ranges by least squares alone.
PLAIN = ["quantization.weight_grid=symmetric", "quantization.refine_images=0"]
NEAREST = [*PLAIN, "quantization.reconstruction=none"]
MINMAX = [*NEAREST, "quantization.ranges=minmax"]

# Title, set, settings, and the run's folder. Ranges are found on the first 64 images of a set.
BASELINES = [
    ("min-max, noise images", "noise", MINMAX, "noise"),
    ("min-max, 64 real images", "real", MINMAX, "real"),
    ("least squares, 64 synthetic images", "synthetic", NEAREST, "nearest"),
    ("GPTQ, 128 synthetic images", "synthetic", [], "gptq"),
]


@benchmark(__doc__)
@model_option
@click.option("--train", required=True, help="Real images of the min-max baseline.")
@click.option("--val", required=True, help="Labelled images the networks are measured on.")
@out_option
@click.option("--images", default=96, show_default=True, help="Synthetic images.")
@click.option("--size", default=320, show_default=True, help="Side in pixels, everywhere.")
@click.option("--widths", default="w8a8,w4a8", show_default=True, help="Recipes, by commas.")
@set_option
def main(
    model: str,
    train: str,
    val: str,
    out: Path,
    images: int,
    size: int,
    widths: str,
    overrides: Sequence[str],
) -> None:
    live = Live()
    common = [f"synthesis.image_size={size}", f"synthesis.images={images}", *overrides]
    started = time.perf_counter()
    synthetic = synthesize(model, load_recipe("w4a8", common), out=out / "synthetic", progress=live)
    minutes = (time.perf_counter() - started) / 60
    noise_recipe = load_recipe(
        None,
        [*common, "synthesis.images=64", "synthesis.iterations=0", "synthesis.labels=none"],
    )
    noise = synthesize(model, noise_recipe, out=out / "noise", progress=live)
    sources: dict[str, str | CalibrationSet] = {
        "noise": noise,
        "real": train,
        "synthetic": synthetic,
    }
    rows: list[tuple[str, str, Any, float]] = [
        ("float", "", Path(model) if Path(model).exists() else model, 0.0)
    ]
    for width in widths.split(","):
        for label, source, settings, folder_name in BASELINES:
            data = sources[source]
            recipe = load_recipe(width, [*common, "method=ptq", *settings])
            folder = out / f"{width}-{folder_name}"
            path = data.root if isinstance(data, CalibrationSet) else data
            run = quantize(recipe, model=model, data=path, out=folder, progress=live)
            rows.append((width.upper(), label, run, 0.0))
        started = time.perf_counter()
        run = quantize(
            load_recipe(width, common),
            model=model,
            data=synthetic.root,
            out=out / f"{width}-qat",
            progress=live,
        )
        spent = (time.perf_counter() - started) / 60
        rows.append((width.upper(), f"zero-shot QAT, {images} synthetic images", run, spent))
    print_table(rows, val, size, minutes)


def print_table(
    rows: Sequence[tuple[str, str, Any, float]], val: str, size: int, minutes: float
) -> None:
    """Measure every row and print the table."""
    data = open_set(val)
    print(
        f"\n{len(data)} images at {size} px, {torch.get_num_threads()} thread(s); "
        f"synthesis {minutes:.1f} min (0 when it was there already)\n"
    )
    columns = ("AP", "95 % interval", "AP50", "AP kept", "training, min")
    print(header("bits", "data and method", *columns))
    reference = None
    for bits, label, source, spent in rows:
        detector = require_detector(load_model(source))
        found = predict(detector, data, image_size=size)
        metrics = score(data, found, detector.names)
        low, high = bootstrap_ap(data, found, detector.names)
        reference = reference or metrics.AP
        print(
            line(
                bits or "float",
                label,
                f"{metrics.AP:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{metrics.AP50:.3f}",
                f"{metrics.AP / reference:.1%}",
                f"{spent:.1f}" if spent else "",
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()

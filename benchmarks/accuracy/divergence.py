"""How far quantized networks are from their float one on real images: steadier than AP.

    python -m benchmarks.accuracy.divergence --model yolov5n.pt --data coco-train \\
      --size 320 RUN [RUN ...]

Prints Markdown: for each run of `dfq qat` the divergence of its predictions from those of the float
network (that of the training, per image), and AP where the set is labelled.
"""

from __future__ import annotations

import click

from benchmarks.common import benchmark, header, line, model_option
from dfq.data.readers import open_set
from dfq.data.training_images import LetterboxedImages
from dfq.evaluation.coco import evaluate
from dfq.evaluation.divergence import mean_divergence
from dfq.models import require_detector
from dfq.runs.loading import load_model


@benchmark(__doc__)
@click.argument("runs", nargs=-1, required=True)
@model_option
@click.option("--data", required=True, help="Real images.")
@click.option("--size", default=320, show_default=True, help="Side in pixels.")
def main(runs: tuple[str, ...], model: str, data: str, size: int) -> None:
    teacher, real = require_detector(load_model(model)), open_set(data)
    images = LetterboxedImages(real, teacher, size)
    print(header("run", "divergence:", "AP:"))
    for run in runs:
        student = require_detector(load_model(run))
        ap = f"{evaluate(student, real, image_size=size).AP:.4f}" if real.labelled else ""
        print(line(run, f"{mean_divergence(student, teacher, images):.2f}", ap), flush=True)


if __name__ == "__main__":
    main()

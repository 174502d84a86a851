"""AP and divergence for strengths of GPTQ's damping and ridge: to choose on a training set.

    python -m benchmarks.accuracy.rounding_strength --model yolov5n.pt --data synthetic \\
      --val coco-train --size 320 --damping 0.01 --damping 0.1 --ridge 0.1

Calibrates once, rounds for every pair, and prints Markdown: AP, and the divergence of the low-bit
network's predictions from the float one's on those images, which is steadier than AP.
"""

from __future__ import annotations

import itertools

import click

from benchmarks.common import benchmark, header, line, model_option
from dfq.data.readers import open_set
from dfq.data.training_images import LetterboxedImages, open_training_data
from dfq.evaluation.coco import evaluate
from dfq.evaluation.divergence import mean_divergence
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.ptq.gptq import gptq_quantize
from dfq.ptq.pipeline import quantized
from dfq.recipe import load_recipe
from dfq.runtime.progress import Silent


@benchmark(__doc__)
@model_option
@click.option("--data", required=True, help="The calibration set.")
@click.option("--val", required=True, help="Real labelled images, not those results are told of.")
@click.option("--recipe", default="w4a8", show_default=True)
@click.option("--size", default=320, show_default=True)
@click.option("--images", default=96, show_default=True)
@click.option("--damping", "dampings", multiple=True, type=float, default=(0.1,))
@click.option("--ridge", "ridges", multiple=True, type=float, default=(0.1,))
def main(
    model: str,
    data: str,
    val: str,
    recipe: str,
    size: int,
    images: int,
    dampings: tuple[float, ...],
    ridges: tuple[float, ...],
) -> None:
    settings = load_recipe(
        recipe, [f"synthesis.image_size={size}", "quantization.reconstruction=none"]
    )
    detector = load_detector(model)
    teacher = fold(detector.clone())
    source = open_training_data(data, detector, size)
    start = quantized(
        teacher, settings.quantization.policy(), settings.quantization, source, Silent()
    )
    pixels = source.load(list(range(min(images, len(source)))))
    real = open_set(val)
    letterboxed = LetterboxedImages(real, detector, size)
    print(header("damping:", "ridge:", "AP:", "divergence:"))
    for damping, ridge in itertools.product(dampings, ridges):
        student = start.clone()
        gptq_quantize(student, teacher, pixels, damping=damping, ridge=ridge)
        found = evaluate(student, real, image_size=size).AP
        far = mean_divergence(student, teacher, letterboxed)
        print(line(damping, ridge, f"{found:.4f}", f"{far:.2f}"), flush=True)


if __name__ == "__main__":
    main()

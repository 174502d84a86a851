"""What the two strengths of second-order rounding keep on real images: choose on a training set.

    python tools/tune_rounding.py --model yolov5n.pt --data synthetic --val coco-train --size 320 \\
      --damping 0.01 --damping 0.1 --ridge 0.1

Calibrates once, rounds for every pair, and prints Markdown: AP, and the divergence of the low-bit
network's predictions from the float one's on those images, which is steadier than AP.
"""

from __future__ import annotations

import itertools

import click

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


@click.command(help=__doc__)
@click.option("--model", required=True)
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
    print("| damping | ridge | AP | divergence |\n| --- | --- | --- | --- |")
    for damping, ridge in itertools.product(dampings, ridges):
        student = start.clone()
        gptq_quantize(student, teacher, pixels, damping=damping, ridge=ridge)
        found = evaluate(student, real, image_size=size).AP
        far = mean_divergence(student, teacher, letterboxed)
        print(f"| {damping} | {ridge} | {found:.4f} | {far:.2f} |", flush=True)


if __name__ == "__main__":
    main()

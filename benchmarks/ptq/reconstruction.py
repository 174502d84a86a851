"""Reconstruction methods against each other, by widths: accuracy, divergence, time.

    python -m benchmarks.ptq.reconstruction --model yolov5n.pt --data set --photos coco-train \\
      --val coco-val --size 320 --out runs/bench/ptq

Each method quantizes the network, a detector or a classifier, on the images of the set; measured
are AP or top-1 on `--val` and the divergence of the predictions from the float network's, an image
of `--photos`, which nothing was made on.
Goes on where it stopped: rows are kept in OUT/results.jsonl. Prints a Markdown table a width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from benchmarks.common import (
    Row,
    benchmark,
    header,
    line,
    model_option,
    names,
    out_option,
    results,
    set_option,
    threads_option,
)
from dfq.data.class_set import ClassSet
from dfq.data.pixels import LabelledImages
from dfq.data.training_images import open_training_data
from dfq.evaluation.measuring import RealSet, main_figure, measured, open_labelled
from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Model
from dfq.models.divergence import divergence_per_image
from dfq.ptq.pipeline import quantized, reconstructs_blocks, with_reconstructed_blocks
from dfq.qat.trainer import Trainer
from dfq.recipe import Recipe, load_recipe
from dfq.runs.loading import load_float
from dfq.runtime.progress import Silent

METHODS = {
    "minmax": ("quantization.ranges=minmax", "quantization.reconstruction=none"),
    "mse": ("quantization.reconstruction=none",),
    **{
        name: (f"quantization.reconstruction={name}",)
        for name in (
            *("gptq", "adaround", "adaquant", "brecq", "apq", "qdrop"),
            *("pd", "spq", "mgrq", "pfcr", "task", "best"),
        )
    },
    "qat": ("method=qat",),
}
"""What each changes of a recipe; `qat` trains after GPTQ."""


def recipe_of(width: str, method: str, size: int, overrides: Sequence[str]) -> Recipe:
    """Of a row: `w4a4`, say, by a method."""
    weights, activations = width.removeprefix("w").split("a")
    changes = [
        f"quantization.weight_bits={weights}",
        f"quantization.activation_bits={activations}",
        f"synthesis.image_size={size}",
        *METHODS[method],
        *overrides,
    ]
    return load_recipe("w4a8", changes)


def made(
    teacher: Model, images: LabelledImages, recipe: Recipe, method: str, folder: Path
) -> tuple[Model, float]:
    """The low-bit network, and the seconds that it took."""
    section = recipe.quantization
    started = time.perf_counter()
    student = quantized(teacher, section.policy(), section, images, Silent())
    if reconstructs_blocks(section):
        with_reconstructed_blocks(student, teacher, section, images, Silent(), seed=recipe.seed)
    if method == "qat":
        trained = Trainer(
            student, teacher, images, recipe.distillation, seed=recipe.seed, folder=folder
        )
        trained.train()
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        for model in (student, teacher):
            model.module.to(memory_format=torch.contiguous_format)
    return student, time.perf_counter() - started


def accuracy(model: Model, val: RealSet, size: int) -> float:
    """AP of a detector, top-1 of a classifier."""
    found = measured(model, val, image_size=size)
    return float(getattr(found, main_figure(model.task)))


def table(rows: Sequence[Row], widths: Sequence[str]) -> str:
    """One Markdown table a width, the methods in their order."""
    lines = []
    figure, whole = next((row["figure"], row[row["figure"]]) for row in rows if "figure" in row)
    for width in widths:
        lines.append(header(width.upper(), f"{figure}:", "kept:", "divergence:", "seconds:"))
        for method in METHODS:
            for row in rows:
                if (row["width"], row["method"]) == (width, method):
                    numbers = (f"{row[figure]:.4f}", f"{row[figure] / whole:.1%}")
                    lines.append(
                        line(method, *numbers, f"{row['divergence']:.3g}", f"{row['seconds']:.0f}")
                    )
        lines.append("")
    return "\n".join(lines)


@benchmark(__doc__)
@model_option
@click.option("--data", required=True, help="A calibration set, or real images.")
@click.option("--photos", required=True, help="Real images that divergence is measured on.")
@click.option("--val", required=True, help="A labelled set to measure on.")
@click.option("--size", default=320, show_default=True, help="Side of the images in pixels.")
@click.option("--widths", default="w8a8,w6a6,w4a8,w4a4,w3a8,w2a8", show_default=True)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--seed", default=0, show_default=True)
@out_option
@set_option
@threads_option
def main(
    model: str,
    data: str,
    photos: str,
    val: str,
    size: int,
    widths: str,
    methods: str,
    seed: int,
    out: Path,
    overrides: tuple[str, ...],
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.jsonl"
    detector = load_float(model, trust=False, device="cpu")
    teacher = fold(detector.clone())
    images = open_training_data(data, detector, size)
    looked = open_training_data(photos, detector, size)
    pixels = looked.load(list(range(len(looked))))
    labelled = open_labelled(val, detector)
    figure = "top1" if isinstance(labelled, ClassSet) else "AP"
    done = {(row["width"], row["method"]) for row in results(file)}

    def keep(row: Row) -> None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    if ("", "float") not in done:
        whole = accuracy(teacher, labelled, size)
        keep({"width": "", "method": "float", "figure": figure, figure: whole})
    asked = widths.split(",")
    for width in asked:
        for method in names(methods, METHODS, "--methods"):
            if (width, method) in done:
                continue
            recipe = recipe_of(width, method, size, (*overrides, f"seed={seed}"))
            student, seconds = made(teacher, images, recipe, method, out)
            apart = divergence_per_image(student, teacher, pixels)
            row = {"divergence": apart, figure: accuracy(student, labelled, size)}
            keep({"width": width, "method": method, "seconds": seconds, **row})
    print(table(list(results(file)), asked))


if __name__ == "__main__":
    main()

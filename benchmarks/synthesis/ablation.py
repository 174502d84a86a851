"""What each choice in synthesis does to the low-bit network that its images make.

    python -m benchmarks.synthesis.ablation --model yolov5n.pt --real coco-train --out ablation

The yardstick is what a set is for: a short W4A8 training of weights rounded to the nearest level,
where the data matter most, then the divergence of the low-bit network from the float one on real
images, and its AP. Every variant gets the same seeds; variants of the image stage share the labels
of a seed. Everything stays in the output folder, a finished cell is not made again, and several
processes may fill one folder with different `--seeds`. Prints Markdown: mean and standard deviation
over the seeds.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.common import (
    benchmark,
    header,
    line,
    model_option,
    names,
    out_option,
    set_option,
)
from dfq.api.quantize import quantize
from dfq.api.synthesize import synthesize
from dfq.data.readers import open_set
from dfq.data.training_images import LetterboxedImages
from dfq.evaluation.coco import evaluate
from dfq.evaluation.divergence import mean_divergence
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector, require_detector
from dfq.recipe import Recipe, load_recipe
from dfq.runs.loading import load_model
from dfq.runtime.files import read_json, write_json

YARDSTICK = [
    "method=qat",
    "distillation.keep_worse=true",
    "quantization.reconstruction=none",
    "distillation.weight_lr=null",
    "distillation.lr=3e-4",
    "distillation.scale_lr=1e-3",
    "distillation.ema=0.9",
    "distillation.selection=ema",
]

# Name: title and settings. Those that leave labels alone take them from the baseline's.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "baseline": ("the default", ()),
    "noise": ("Gaussian noise", ("synthesis.iterations=0", "synthesis.init=gaussian")),
    "swing": ("swing convolutions", ("synthesis.techniques.swing=true",)),
    "distances": ("distances instead of divergences", ("synthesis.bn_form=relative",)),
    "pixels": ("no coarser grids", ("synthesis.scales=0",)),
    "no-settling": ("no settling", ("synthesis.settle=0",)),
    "no-tv": ("no total variation", ("synthesis.weights.tv=0",)),
    "no-erase": ("no erasing", ("synthesis.erase=0",)),
    "gaussian": ("Gaussian start", ("synthesis.init=gaussian",)),
    "pink": ("1/f start", ("synthesis.init=pink",)),
    "no-multires": ("full size throughout", ("synthesis.multires=0",)),
    "float32": ("float32", ("synthesis.precision=float32",)),
    "task-0": ("labels without weight", ("synthesis.weights.task=0",)),
    "task-3": ("labels with weight 3", ("synthesis.weights.task=3",)),
    "task-agnostic": ("no labels", ("synthesis.labels=none",)),
    "single": ("single labels", ("synthesis.labels=single",)),
    "multi": ("multi labels", ("synthesis.labels=multi",)),
    "paper-sampler": (
        "the paper's sampler",
        (
            "synthesis.label_stage.sampler=paper",
            "synthesis.label_stage.smallest_area=0.01",
            "synthesis.label_stage.iterations=240",
            "synthesis.label_stage.start=0.33",
            "synthesis.label_stage.updates=12",
        ),
    ),
    "batch-4": ("batches of 4", ("synthesis.batch_size=4",)),
    "batch-8": ("batches of 8", ("synthesis.batch_size=8",)),
    "batch-16": ("batches of 16", ("synthesis.batch_size=16",)),
}

OWN_LABELS = {"paper-sampler"}
"""Variants of the label stage itself, which cannot take the baseline's labels."""


@dataclass
class Ablation:
    """The experiment: one cell for a variant and a seed, each made once."""

    model: str
    real: str
    out: Path
    common: Sequence[str]

    def recipe(self, seed: int, settings: Sequence[str]) -> Recipe:
        return load_recipe("w4a8", [*YARDSTICK, *self.common, f"seed={seed}", *settings])

    def labels(self, seed: int) -> Path:
        """A set whose labels are the baseline's of a seed; its images are noise."""
        recipe = self.recipe(seed, ["synthesis.iterations=0"])
        return synthesize(self.model, recipe, out=self.out / f"labels-{seed}", workers=1).root

    def cell(self, variant: str, seed: int) -> dict[str, float]:
        """Divergence and AP of the network made with a variant's images."""
        file = self.out / "cells" / f"{variant}-{seed}.json"
        settings = list(VARIANTS[variant][1])
        if file.is_file():
            found = read_json(file)
            if found["settings"] == [*self.common, *settings]:
                return dict(found)
        if variant not in OWN_LABELS and not any("synthesis.labels=" in s for s in settings):
            settings.append(f"synthesis.labels=real:{self.labels(seed)}")
        recipe = self.recipe(seed, settings)
        folder = self.out / f"{variant}-{seed}"
        data = synthesize(self.model, recipe, out=folder / "set", workers=1)
        run = quantize(recipe, model=self.model, data=data.root, out=folder / "run")
        result: dict[str, Any] = {"settings": [*self.common, *VARIANTS[variant][1]]}
        result |= self.measure(run, recipe)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
        shutil.rmtree(folder / "run")
        return result

    def measure(self, run: Path, recipe: Recipe) -> dict[str, float]:
        size = recipe.synthesis.image_size
        assert size is not None
        teacher, student = fold(load_detector(self.model)), require_detector(load_model(run))
        real = open_set(self.real)
        return {
            "divergence": mean_divergence(student, teacher, LetterboxedImages(real, teacher, size)),
            "AP": evaluate(student, real, image_size=size).AP,
        }


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation; of a single value, the value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def row(title: str, cells: Sequence[dict[str, float]], base: Sequence[dict[str, float]]) -> str:
    """One line of the table. The change is the mean over the seeds of the difference to the
    baseline of the same seed, beside its standard deviation."""
    change = [c["divergence"] - b["divergence"] for c, b in zip(cells, base, strict=True)]
    return line(
        title,
        spread([c["divergence"] for c in cells], 2),
        spread(change, 2),
        spread([c["AP"] for c in cells], 4),
    )


@benchmark(__doc__)
@model_option
@click.option("--real", required=True, help="Labelled images to choose on; not those to report on.")
@out_option
@click.option("--variants", default=",".join(VARIANTS), help="Rows, by commas; all by default.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--size", default=160, show_default=True, help="Side in pixels, everywhere.")
@click.option("--images", default=32, show_default=True, help="Of a set, and of its batches.")
@click.option("--iterations", default=120, show_default=True)
@click.option("--epochs", default=15, show_default=True)
@set_option
def main(
    model: str,
    real: str,
    out: Path,
    variants: str,
    seeds: str,
    size: int,
    images: int,
    iterations: int,
    epochs: int,
    overrides: tuple[str, ...],
) -> None:
    chosen = names(variants, VARIANTS, "--variants")
    common = [
        f"synthesis.image_size={size}",
        f"synthesis.images={images}",
        f"synthesis.batch_size={images}",
        f"synthesis.iterations={iterations}",
        f"distillation.epochs={epochs}",
        *overrides,
    ]
    print_table(Ablation(model, real, out, common), chosen, [int(s) for s in seeds.split(",")])


def print_table(ablation: Ablation, variants: Sequence[str], seeds: Sequence[int]) -> None:
    """Make what is missing, and print a line as soon as its cells are there."""
    base = [ablation.cell("baseline", seed) for seed in seeds]
    click.echo(header("variant", "divergence:", "change:", "AP:"))
    for name in variants:
        cells = [ablation.cell(name, seed) for seed in seeds]
        click.echo(row(VARIANTS[name][0], cells, base))


if __name__ == "__main__":
    main()

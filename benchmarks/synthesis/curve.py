"""What a set is worth against the time it took: the paper's schedule of synthesis and ours.

    python -m benchmarks.synthesis.curve --model yolov5n.pt --real coco-train --out curve

Each point is a set made with a share of a schedule's iterations, label stage and image stage alike.
Its worth is that of benchmarks/synthesis/ablation.py: the AP on real images of a network after one
fixed, short W4A8 training on it, and the divergence from the float one. Its time is the number of
iterations of each kind times what one takes, measured here in turns for all kinds, so that what
else the machine was doing falls out; the paper's schedule runs in our loop, with our precision.
Sets and cells stay in the output folder and are not made again. Prints Markdown, draws curve.png.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import matplotlib
import torch

from benchmarks.common import benchmark, header, in_turns, line, model_option, out_option
from benchmarks.synthesis.ablation import Ablation, spread
from dfq.api.quantize import quantize
from dfq.api.synthesize import synthesize
from dfq.models import load_detector
from dfq.recipe import Recipe, load_recipe
from dfq.runtime.files import read_json, write_json
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.labels import single

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SCHEDULES = {"paper": "paper-yolov5", "ours": "w4a8"}


@dataclass
class Curve:
    """The experiment: one cell for a schedule, a share of its iterations, and a seed."""

    ablation: Ablation
    size: int
    images: int

    def recipe(self, schedule: str, share: float, seed: int) -> Recipe:
        """How the set is made."""
        name = SCHEDULES[schedule]
        whole = load_recipe(name).synthesis
        task = whole.weights.task
        if whole.balance == "loss":
            # The paper's loss is scaled by the batch, ours is a mean: its weight has the batch in.
            task *= self.images / whole.batch_size
        return load_recipe(
            name,
            [
                f"synthesis.weights.task={task}",
                f"seed={seed}",
                f"synthesis.image_size={self.size}",
                f"synthesis.images={self.images}",
                f"synthesis.batch_size={self.images}",
                "synthesis.precision=auto",
                f"synthesis.iterations={round(share * whole.iterations)}",
                f"synthesis.label_stage.iterations={round(share * whole.label_stage.iterations)}",
            ],
        )

    def cell(self, schedule: str, share: float, seed: int) -> dict[str, float]:
        """Divergence and AP."""
        name = f"{schedule}-{share:g}-{seed}"
        file = self.ablation.out / "cells" / f"{name}.json"
        if file.is_file():
            return dict(read_json(file))
        made = self.recipe(schedule, share, seed)
        out = self.ablation.out
        data = synthesize(self.ablation.model, made, out=out / "sets" / name, workers=1)
        training = self.ablation.recipe(seed, [])
        run = quantize(training, model=self.ablation.model, data=data.root, out=out / "runs" / name)
        found = self.ablation.measure(run, training)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
        return found


def seconds_per_iteration(model: str, recipes: dict[str, Recipe], rounds: int) -> dict[str, float]:
    """Of each schedule at each of its sizes, as "schedule-size": medians over rounds in turns."""
    torch.set_num_threads(1)
    detector = load_detector(model)
    iterations = 4
    runs: dict[str, Callable[[], object]] = {}
    for schedule, recipe in recipes.items():
        settings = recipe.synthesis
        inversion = Inversion(detector, settings)
        generator = torch.Generator().manual_seed(0)
        labels = single(generator, settings.batch_size, detector.num_classes)
        for side in sorted({settings.label_stage.image_size, *_sides(recipe)}):
            noise = torch.rand(settings.batch_size, 3, side, side, generator=generator)
            runs[f"{schedule}-{side}"] = partial(
                inversion.optimise, noise, labels, iterations, 0.1, generator, stage="time"
            )
    times = in_turns(runs, rounds)
    return {kind: statistics.median(found) / iterations for kind, found in times.items()}


def _sides(recipe: Recipe) -> tuple[int, int]:
    """Sides of the two parts of the image stage, small and full."""
    full = recipe.synthesis.image_size
    assert full is not None
    return (full // 2, full) if recipe.synthesis.multires > 0 else (full, full)


def duration(recipe: Recipe, schedule: str, rates: dict[str, float]) -> float:
    """Seconds that the iterations of one batch take."""
    settings = recipe.synthesis
    small, full = _sides(recipe)
    coarse = round(settings.multires * settings.iterations)
    stage = settings.label_stage
    return (
        stage.iterations * rates[f"{schedule}-{stage.image_size}"]
        + coarse * rates[f"{schedule}-{small}"]
        + (settings.iterations - coarse) * rates[f"{schedule}-{full}"]
    )


def draw(points: dict[str, list[tuple[float, list[float]]]], path: Path) -> None:
    """AP against seconds, one line a schedule, a dot a seed."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for schedule, found in points.items():
        found = sorted(found)
        means = [statistics.fmean(values) for _, values in found]
        (line,) = axes.plot([at for at, _ in found], means, label=schedule)
        for at, values in found:
            axes.plot([at] * len(values), values, "o", color=line.get_color(), ms=4)
    axes.set(xscale="log", xlabel="seconds of synthesis, one core", ylabel="AP after a short QAT")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


@benchmark(__doc__)
@model_option
@click.option("--real", required=True, help="Labelled images to measure on.")
@out_option
@click.option("--size", default=320, show_default=True, help="Side in pixels, everywhere.")
@click.option("--images", default=32, show_default=True, help="Of a set, in one batch.")
@click.option("--epochs", default=15, show_default=True, help="Of the training, in batches of 8.")
@click.option("--paper", default="0.0625,0.25,1", show_default=True, help="Shares of its schedule.")
@click.option("--ours", default="0.25,1", show_default=True, help="Shares of our schedule.")
@click.option("--paper-seeds", default="0", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="Of ours.")
@click.option("--rounds", default=5, show_default=True, help="Of the timing.")
def main(
    model: str,
    real: str,
    out: Path,
    size: int,
    images: int,
    epochs: int,
    paper: str,
    ours: str,
    paper_seeds: str,
    seeds: str,
    rounds: int,
) -> None:
    common = [f"distillation.epochs={epochs}", "distillation.batch_size=8"]
    common.append(f"synthesis.image_size={size}")
    curve = Curve(Ablation(model, real, out, common), size, images)
    wholes = {schedule: curve.recipe(schedule, 1, 0) for schedule in SCHEDULES}
    rates = seconds_per_iteration(model, wholes, rounds)
    click.echo(", ".join(f"{kind} px: {value:.3f} s" for kind, value in sorted(rates.items())))
    click.echo("\n" + header("schedule", "seconds:", "seeds:", "AP:", "divergence:"))
    points: dict[str, list[tuple[float, list[float]]]] = {}
    for schedule, shares, numbers in (("paper", paper, paper_seeds), ("ours", ours, seeds)):
        for share in (float(text) for text in shares.split(",")):
            cells = [curve.cell(schedule, share, int(seed)) for seed in numbers.split(",")]
            taken = duration(curve.recipe(schedule, share, 0), schedule, rates)
            points.setdefault(schedule, []).append((taken, [cell["AP"] for cell in cells]))
            click.echo(
                line(
                    f"{schedule}, {share:g} of it",
                    f"{taken:.0f}",
                    len(cells),
                    spread([cell["AP"] for cell in cells], 4),
                    spread([cell["divergence"] for cell in cells], 2),
                )
            )
    draw(points, out / "curve.png")


if __name__ == "__main__":
    main()

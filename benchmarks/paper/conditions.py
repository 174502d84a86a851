"""Under which conditions tables and figures are made: detector, sets, size, and by how much the
recipes are scaled down."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from benchmarks.common import model_option, out_option, set_option, threads_option
from dfq.models import load_detector
from dfq.models.base import Detector
from dfq.recipe import Recipe, load_recipe

PAPER, OURS, LSQ = "paper", "w4a8", "lsq-real"
"""Recipes: the paper's for the detector's family; ours, which at other widths differs in the bits
alone; LSQ's on real images."""

_PAPERS = {"yolov5": "paper-yolov5", "ultralytics": "paper-yolo11"}


def paper_recipe(detector: Detector) -> str:
    """The paper's recipe for a detector's family; those it did not have are taken for Mask
    R-CNN."""
    return _PAPERS.get(detector.family, "paper-mask-rcnn-r50")


def bits(width: str) -> tuple[int, int]:
    """Bits of weights and of activations of a width such as "w4a8".

    Raises:
        click.UsageError: it is written in another way.
    """
    parsed = re.fullmatch(r"w([2-8])a([2-9]|1[0-6])", width)
    if parsed is None:
        raise click.UsageError(f"--widths {width}: write them as w4a8, by commas")
    return int(parsed[1]), int(parsed[2])


@dataclass(frozen=True)
class Conditions:
    """What is the same for all rows.

    Attributes:
        model: the float detector.
        real: labelled real images to train on and to take labels from.
        val: labelled real images to measure on.
        out: folder of all that is made.
        size: side in pixels, everywhere.
        images: of a synthetic set.
        iterations: of the image stage, for every recipe; the label stage has as many as the recipe
            has for so many of the image stage. None: each recipe's own.
        epochs: of every training; None: each recipe's own.
        paper: name of the paper's recipe.
        overrides: changes to every recipe, after all others.
    """

    model: str
    real: str
    val: str
    out: Path
    size: int
    images: int
    iterations: int | None
    epochs: int | None
    paper: str
    overrides: tuple[str, ...] = ()

    def recipe(self, name: str, width: str, seed: int, settings: Sequence[str]) -> Recipe:
        """A recipe, scaled.

        Args:
            name: `PAPER`, `OURS` or `LSQ`.
            width: as "w4a8".
            seed: of synthesis and training.
            settings: of a row of a table.

        Raises:
            UserError: a setting is none that the recipe can have.
        """
        weights, activations = bits(width)
        file = self.paper if name == PAPER else name
        changes = [
            f"seed={seed}",
            f"quantization.weight_bits={weights}",
            f"quantization.activation_bits={activations}",
            f"synthesis.image_size={self.size}",
            f"synthesis.images={self.images}",
            *self._scaled(load_recipe(file)),
            *settings,
            *self.overrides,
        ]
        recipe = load_recipe(file, changes)
        if name != PAPER:
            return recipe
        return load_recipe(file, [*changes, *_weights(load_recipe(file), recipe)])

    def _scaled(self, own: Recipe) -> list[str]:
        changes = []
        if self.iterations is not None:
            share = self.iterations / own.synthesis.iterations
            labelling = max(1, round(share * own.synthesis.label_stage.iterations))
            changes += [
                f"synthesis.iterations={self.iterations}",
                f"synthesis.label_stage.iterations={labelling}",
            ]
        if self.epochs is not None:
            changes.append(f"distillation.epochs={self.epochs}")
        return changes

    def describe(self, seeds: Sequence[int], measured_on: int) -> str:
        """A sentence of what the figures are of."""
        iterations = (
            "iterations of synthesis as in each recipe"
            if self.iterations is None
            else f"{self.iterations} iterations of the image stage"
        )
        epochs = "epochs as in each recipe" if self.epochs is None else f"{self.epochs} epochs"
        changed = f"; {' '.join(f'--set {text}' for text in self.overrides)}"
        return (
            f"{Path(self.model).name} at {self.size} px; sets of {self.images} images, "
            f"{iterations}; {epochs}; the paper's recipe is {self.paper}; seeds "
            f"{', '.join(map(str, seeds))}; measured on {measured_on} images"
            f"{changed if self.overrides else ''}"
        )


def _weights(own: Recipe, scaled: Recipe) -> list[str]:
    """The paper's losses of the task are sums over the batch, ours are means: its weights have the
    batch in, and go with it where a set or a batch is smaller than its."""
    changes = []
    for section in ("synthesis", "distillation"):
        whole = getattr(own, section).batch_size
        batch = min(getattr(scaled, section).batch_size, scaled.synthesis.images)
        weight = getattr(scaled, section).weights.task * batch / whole
        changes.append(f"{section}.weights.task={weight:g}")
    return changes


def command(module: str) -> str:
    """How this process was called, to be repeated."""
    return f"python -m {module} {shlex.join(sys.argv[1:])}"


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers by commas.

    Raises:
        click.UsageError: there is something else, or nothing.
    """
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise click.UsageError(f"{option} {text}: write whole numbers by commas")
    return tuple(int(part) for part in text.split(","))


def with_conditions(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options, and gives what they say as `conditions` and `seeds`."""

    @wraps(function)
    def wrapped(
        model: str,
        real: str,
        val: str,
        out: Path,
        size: int | None,
        images: int,
        iterations: int | None,
        epochs: int | None,
        paper: str | None,
        seeds: str,
        overrides: tuple[str, ...],
        **options: Any,
    ) -> Any:
        chosen = numbers(seeds, "--seeds")
        detector = load_detector(model)
        side = size or detector.image_size
        detector.check_size(side, "--size")
        paper = paper or paper_recipe(detector)
        conditions = Conditions(
            model, real, val, out, side, images, iterations, epochs, paper, overrides
        )
        return function(conditions=conditions, seeds=chosen, **options)

    for option in (
        set_option,
        threads_option,
        click.option("--seeds", default="0,1,2", show_default=True, help="By commas."),
        click.option("--paper", help="The paper's recipe; by default that of the family."),
        click.option(
            "--epochs", type=click.IntRange(1), help="Of every training; each recipe's by default."
        ),
        click.option(
            "--iterations", type=click.IntRange(1),
            help="Of synthesis, for every recipe; each one's own by default.",
        ),
        click.option(
            "--images", type=click.IntRange(1), default=2000, show_default=True,
            help="Of a synthetic set.",
        ),
        click.option(
            "--size", type=click.IntRange(32), help="Side in pixels; the model's by default."
        ),
        out_option,
        click.option("--val", required=True, help="A labelled SET to measure on."),
        click.option("--real", required=True, help="A labelled SET to train on, not --val's."),
        model_option,
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped

"""The whole zero-shot flow on small two-stage detectors, trained here or found in --out.

For each network: box and mask AP of the float one, of min-max PTQ on noise, and of zero-shot QAT,
at W8A8 and W4A8, on drawn scenes that none of them saw. Writes `table.md` into
--out; a second call goes on where the first stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch

import dfq
from benchmarks.common import benchmark, header, line, out_option, set_option
from dfq.demo import write_coco
from dfq.evaluation.coco import Metrics
from dfq.recipe import Recipe, load_recipe
from scripts.small_rcnn import FAMILIES, SIDE, train_rcnn

BITS = ("w8a8", "w4a8")
BUDGET = (
    "synthesis.images=64",
    "synthesis.iterations=80",
    f"synthesis.label_stage.image_size={SIDE * 3 // 4}",
    "synthesis.label_stage.iterations=48",
)
"""An eighth of the recipes' images, and fewer steps: a few minutes a network on one CPU core."""

NAIVE = (
    "synthesis.images=32",
    "synthesis.iterations=0",
    "synthesis.labels=none",
    "method=ptq",
    "quantization.ranges=minmax",
    "quantization.reconstruction=none",
    "quantization.weight_grid=symmetric",
)

_HEADER = header(
    *("network", "bits", "AP:", "on noise:", "zero-shot:", "kept:"),
    *("mask AP:", "on noise:", "zero-shot:", "kept:"),
)


class Bench:
    """The measurements of one network, each made once.

    Args:
        out: folder of everything.
        family: a key of `FAMILIES`, trained.
        scenes: the labelled set to measure on.
        overrides: changes to the recipes.
        name: of the zero-shot runs, to keep several apart.
    """

    def __init__(
        self, out: Path, family: str, scenes: Path, overrides: Sequence[str], name: str
    ) -> None:
        self.out, self.family, self.scenes, self.name = out, family, scenes, name
        self.weights = str(out / f"{family}.safetensors")
        self.overrides = (*BUDGET, *overrides)

    def measured(self, model: str | Path, name: str) -> dict[str, float]:
        """Box and mask AP (NaN where there are no masks) of a network or a run."""
        file = self.out / f"{self.family}-{name}.json"
        if not file.is_file():
            found: Metrics = dfq.evaluate(model, self.scenes)
            masks = math.nan if found.masks is None else found.masks.AP
            file.write_text(json.dumps({"AP": found.AP, "mask_AP": masks}))
        value: dict[str, float] = json.loads(file.read_text())
        return value

    def naive(self, bits: str) -> dict[str, float]:
        """Ranges alone, from noise."""
        return self._quantized(load_recipe(bits, NAIVE), f"{bits}-noise", "noise")

    def zero_shot(self, bits: str) -> dict[str, float]:
        """The recipe of these bits, on images of the network's own."""
        recipe = load_recipe(bits, self.overrides)
        return self._quantized(recipe, f"{bits}-{self.name}", f"set-{self.name}")

    def _quantized(self, recipe: Recipe, name: str, data: str) -> dict[str, float]:
        images, began = self.out / f"{self.family}-{data}", time.monotonic()
        dfq.synthesize(self.weights, recipe, out=images, device="cpu", workers=1)
        made = time.monotonic()
        run = self.out / f"{self.family}-{name}"
        dfq.quantize(recipe, model=self.weights, data=images, out=run, device="cpu")
        click.echo(
            f"{run.name}: images {made - began:.0f} s, quantized {time.monotonic() - made:.0f} s"
        )
        return self.measured(run, name)


def rows_of(bench: Bench) -> list[str]:
    """The rows of the table for one network."""
    top = bench.measured(bench.weights, "float")
    rows = []
    for bits in BITS:
        found = [top, bench.naive(bits), bench.zero_shot(bits)]
        cells = [bench.family, bits.upper()]
        for key in ("AP", "mask_AP"):
            values = [one[key] for one in found]
            kept = f"{values[2] / values[0]:.1%}" if values[0] > 0 else ""
            cells += ["" if math.isnan(value) else f"{value:.3f}" for value in values] + [kept]
        rows.append(line(*cells))
        click.echo(rows[-1])
    return rows


@benchmark(__doc__)
@out_option
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)))
@click.option("--scenes", default=5000, show_default=True, help="To train on.")
@click.option("--epochs", default=4, show_default=True, help="Of the float training.")
@click.option("--validation", default=100, show_default=True, help="Scenes to measure on.")
@click.option("--threads", default=2, show_default=True)
@set_option
@click.option("--name", default="zero-shot", show_default=True, help="Of the runs, if several.")
def main(
    out: Path,
    families: tuple[str, ...],
    scenes: int,
    epochs: int,
    validation: int,
    threads: int,
    overrides: tuple[str, ...],
    name: str,
) -> None:
    torch.set_num_threads(threads)
    data = write_coco(out / "scenes", validation, SIDE).parent
    rows: list[str] = []
    for family in families or tuple(FAMILIES):
        weights = out / f"{family}.safetensors"
        if not weights.is_file():
            train_rcnn(
                family, out / family, weights,
                scenes=scenes, epochs=epochs, batch=8, learning_rate=1e-3,
            )  # fmt: skip
        rows += rows_of(Bench(out, family, data, overrides, name))
    table = "\n".join([_HEADER, *rows]) + "\n"
    (out / "table.md").write_text(table)
    click.echo(table)


if __name__ == "__main__":
    main()

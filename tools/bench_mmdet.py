"""The whole zero-shot flow on small two-stage detectors, trained here or found in --out.

For each network: box AP of the float one, of min-max PTQ on noise, and of zero-shot QAT, at W8A8
and W4A8, on drawn scenes that none of them saw. Writes `table.md` into --out.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from small_rcnn import FAMILIES, SIDE, train_rcnn

import dfq
from dfq.demo import write_coco
from dfq.recipe import Recipe, load_recipe


def _recipe(bits: str, overrides: tuple[str, ...], *more: str) -> Recipe:
    return load_recipe(bits, [f"synthesis.label_stage.image_size={SIDE}", *more, *overrides])


def _ap(run: Path, scenes: Path) -> float:
    return dfq.evaluate(run, scenes).AP


@click.command(help=(__doc__ or "").split("\n", maxsplit=1)[0])
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)))
@click.option("--scenes", default=8000, show_default=True, help="To train on.")
@click.option("--epochs", default=8, show_default=True, help="Of the float training.")
@click.option("--validation", default=200, show_default=True, help="Scenes to measure on.")
@click.option("--threads", default=2, show_default=True)
@click.option("--set", "overrides", multiple=True, help="Changes the recipes.")
def main(
    out: Path,
    families: tuple[str, ...],
    scenes: int,
    epochs: int,
    validation: int,
    threads: int,
    overrides: tuple[str, ...],
) -> None:
    torch.set_num_threads(threads)
    data = write_coco(out / "scenes", validation, SIDE).parent
    rows = []
    for family in families or tuple(FAMILIES):
        weights = out / f"{family}.safetensors"
        if not weights.is_file():
            train_rcnn(
                family, out / family, weights,
                scenes=scenes, epochs=epochs, batch=16, learning_rate=1e-3,
            )  # fmt: skip
        top = dfq.evaluate(str(weights), data).AP
        for bits in ("w8a8", "w4a8"):
            noise = _recipe(
                bits, overrides, "synthesis.iterations=0", "synthesis.labels=none",
                "method=ptq", "quantization.ranges=minmax", "quantization.rounding=nearest",
            )  # fmt: skip
            naive = dfq.quantize(
                noise, model=str(weights), out=out / f"{family}-{bits}-noise", device="cpu"
            )
            tuned = dfq.quantize(
                _recipe(bits, overrides),
                model=str(weights),
                out=out / f"{family}-{bits}-zero-shot",
                device="cpu",
            )
            row = [top, _ap(naive, data), _ap(tuned, data)]
            rows.append([family, bits, *row])
            kept = f"{row[2] / top:.1%}" if top > 0 else "-"
            click.echo(f"{family} {bits}: float {row[0]:.3f}  naive {row[1]:.3f}  "
                       f"zero-shot {row[2]:.3f} ({kept})")  # fmt: skip
    (out / "results.json").write_text(json.dumps(rows))
    lines = ["| network | bits | float | PTQ on noise | zero-shot QAT |", "|---|---|---|---|---|"]
    lines += [f"| {r[0]} | {r[1]} | {r[2]:.3f} | {r[3]:.3f} | {r[4]:.3f} |" for r in rows]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    click.echo((out / "table.md").read_text())


if __name__ == "__main__":
    main()

"""`dfq demo`: the whole zero-shot flow on the small detector that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..dataset.preview import write_preview
from ..files import write_json
from ..progress import Progress
from ..recipe import load_recipe
from ..verbs import evaluate, quantize, synthesize
from .scenes import VALIDATION_SEED_START, write_coco

SCENES = 200
SIZE = 160


def run_demo(out: Path, progress: Progress) -> dict[str, Any]:
    """Synthesize from the demo detector, quantize it to W4A8 naively and by zero-shot QAT, and
    measure all three on scenes none of them ever saw.

    Writes the sets, the runs, `images.png` and `results.json` to `out`; an interrupted demo goes on
    where it was. Returns what `results.json` holds.
    """
    out.mkdir(parents=True, exist_ok=True)
    validation = out / "validation"
    if not (validation / "annotations.json").is_file():
        write_coco(validation, SCENES, SIZE, first_seed=VALIDATION_SEED_START)

    made = synthesize("demo", "demo", out=out / "synthetic", progress=progress)
    write_preview(made, out / "images.png")
    noise = load_recipe(
        "demo", ["synthesis.images=64", "synthesis.iterations=0", "synthesis.labels=none"]
    )
    synthesize("demo", noise, out=out / "noise", progress=progress)

    minmax = [
        "method=ptq",
        "quantization.ranges=minmax",
        "quantization.rounding=nearest",
        "quantization.weight_grid=symmetric",
    ]
    per_channel = load_recipe("demo", minmax)
    naive = load_recipe("demo", [*minmax, "quantization.weights=per_tensor"])
    models: dict[str, str | Path] = {
        "float": "demo",
        "naive W4A8 (min-max, noise)": quantize(
            naive, model="demo", data=out / "noise", out=out / "naive", progress=progress
        ),
        "the same, a scale per channel": quantize(
            per_channel,
            model="demo",
            data=out / "noise",
            out=out / "per-channel",
            progress=progress,
        ),
        "zero-shot QAT W4A8": quantize(
            "demo", model="demo", data=made.root, out=out / "zero-shot", progress=progress
        ),
    }
    results: dict[str, Any] = {}
    for name, model in models.items():
        found = evaluate(model, validation, progress=progress)
        results[name] = {"AP": found.AP, "AP50": found.AP50}
    for row in results.values():
        row["kept"] = row["AP"] / results["float"]["AP"]
    write_json(out / "results.json", results)
    _print(results, out)
    return results


def _print(results: dict[str, Any], out: Path) -> None:
    table = Table(title=f"demo detector on {SCENES} unseen scenes")
    table.add_column("network")
    for column in ("AP", "AP50", "AP kept"):
        table.add_column(column, justify="right")
    for name, row in results.items():
        table.add_row(name, f"{row['AP']:.3f}", f"{row['AP50']:.3f}", f"{row['kept']:.1%}")
    console = Console()
    console.print(table)
    for what, name in (
        ("synthetic images with their labels", "images.png"),
        ("the quantized network", "zero-shot"),
    ):
        console.print(f"{what}: {out / name}", highlight=False, markup=False)

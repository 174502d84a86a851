"""`dfq demo`: the whole zero-shot flow on the small detector that comes with the package."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..dataset.calibration import CalibrationSet
from ..dataset.readers import ImageSet, open_set
from ..detectors.base import Detections
from ..evaluation.coco import predict, score
from ..files import write_atomic, write_json
from ..models import load_model
from ..progress import Progress
from ..quantization.listing import describe
from ..recipe import load_recipe
from ..report.cost import cost_of
from ..report.material import Compared, Comparison
from ..verbs import quantize, synthesize
from .picture import Column, draw_picture
from .scenes import VALIDATION_SEED_START, write_coco

SCENES = 200
SIZE = 160
SHOWN = 4
"""Scenes in the picture."""

PAGE = "report.html"

FLOAT = "float"
ZERO_SHOT = "zero-shot QAT W4A8"

_COLUMNS = ("Float", "Naive (min-max, noise)", "Naive, a scale per channel", "This")
"""Of the page, in the order that they are measured."""


def run_demo(out: Path, progress: Progress) -> dict[str, Any]:
    """Synthesize from the demo detector, quantize it to W4A8 naively and by zero-shot QAT, and
    measure all three on scenes none of them ever saw.

    Writes the sets, the runs, `images.png`, `report.html` and `results.json` to `out`; an
    interrupted demo goes on where it was. Returns what `results.json` holds.
    """
    out.mkdir(parents=True, exist_ok=True)
    validation = out / "validation"
    if not (validation / "annotations.json").is_file():
        write_coco(validation, SCENES, SIZE, first_seed=VALIDATION_SEED_START)

    made = synthesize("demo", "demo", out=out / "synthetic", progress=progress)
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
        FLOAT: "demo",
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
        ZERO_SHOT: quantize(
            "demo", model="demo", data=made.root, out=out / "zero-shot", progress=progress
        ),
    }
    results: dict[str, Any] = {}
    scenes = open_set(validation)
    found: dict[str, list[Detections]] = {}
    costs = {}
    for name, model in models.items():
        detector = load_model(model)
        with progress.task("evaluation", len(scenes), "images") as task:
            found[name] = predict(detector, scenes, progress=task.update)
        measured = score(scenes, found[name], detector.names)
        results[name] = {"AP": measured.AP, "AP50": measured.AP50}
        costs[name] = cost_of(describe(detector))
    for row in results.values():
        row["kept"] = row["AP"] / results["float"]["AP"]
    write_json(out / "results.json", results)
    write_atomic(out / "images.png", _picture(scenes, found, results, made))
    # Not above: what draws is slow to import.
    from ..report.verb import report

    report(models[ZERO_SHOT], out / PAGE, comparison=_comparison(results, costs))
    _print(results, out)
    return results


def _comparison(results: dict[str, Any], costs: dict[str, Any]) -> Comparison:
    """What was measured, as the page shows it; by network."""
    return Comparison(
        [
            Compared(
                label,
                row["AP"],
                row["AP50"],
                this=name == ZERO_SHOT,
                before=name == FLOAT,
                cost=costs[name],
            )
            for label, (name, row) in zip(_COLUMNS, results.items(), strict=True)
        ],
        data=f"{SCENES} scenes that none of them ever saw",
        source="results.json of the demo",
        command="dfq demo",
    )


def _picture(
    scenes: ImageSet,
    found: dict[str, list[Detections]],
    results: dict[str, Any],
    made: CalibrationSet,
) -> bytes:
    """What there is to see, a PNG file."""
    # The first that show something to compare: not chosen by what was detected.
    chosen = [index for index, item in enumerate(scenes.items) if 3 <= len(item.boxes) <= 5]
    before, after = results[FLOAT], results[ZERO_SHOT]
    where = f"on {len(scenes)} unseen scenes"
    columns = (
        Column("The float network", f"AP {before['AP']:.3f} {where}", found[FLOAT]),
        Column(
            "4-bit weights, 8-bit activations",
            f"AP {after['AP']:.3f}, {after['kept']:.1%} of the float one's",
            found[ZERO_SHOT],
        ),
    )
    picture = draw_picture(scenes, chosen[:SHOWN], columns, made)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


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
        ("the page of it, to open in a browser", PAGE),
        ("what both networks detect, side by side", "images.png"),
        ("the quantized network", "zero-shot"),
    ):
        console.print(f"{what}: {out / name}", highlight=False, markup=False)

"""`dfq demo`: the small detector that comes with the package, deployed, and measured on scenes that
nobody saw."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from ..data.calibration_set import CalibrationSet
from ..data.readers import ImageSet, open_set
from ..demo.picture import Column, draw_picture
from ..demo.scenes import VALIDATION_SEED_START, write_coco
from ..evaluation.coco import predict, score
from ..export.opened import open_exported
from ..export.targets import load_target
from ..models import require_detector
from ..models.base import Detecting, Detections
from ..quantization.inspection import list_layers
from ..recipe import load_recipe
from ..report.cost import cost_of
from ..report.material import Compared, Comparison
from ..runs.deployment import Deployment
from ..runs.folder import load_run
from ..runs.loading import load_model
from ..runtime.files import read_json, write_atomic, write_json
from ..runtime.progress import Progress
from .deploy import RECIPE, deploy
from .quantize import quantize
from .synthesize import synthesize

SCENES = 200
SIZE = 160
SHOWN = 4
"""Scenes in the picture."""

TARGET = "onnxruntime-cpu"

SMALL = {
    "synthesis.images": 64,
    "synthesis.iterations": 160,
    "quantization.rounding_images": 48,
}
"""Less work than a deployment has by itself: a demo is over in minutes."""

PAGE = "report.html"
RESULTS = "results.json"
PICTURE = "images.png"

FLOAT = "float"
NAIVE = "naive INT8 (min-max, noise)"
THIS = "this INT8 file, in onnxruntime"

_COLUMNS = {FLOAT: "Float", NAIVE: "Naive (min-max, noise)", THIS: "This"}
"""Of the page."""


def run_demo(out: Path, progress: Progress) -> Deployment:
    """Deploy the demo detector, quantize it naively as well, and measure both and the float one on
    scenes none of them ever saw.

    Writes what a deployment writes to `out`, and `images.png` and `results.json`; an interrupted
    demo goes on where it was, and of a finished one the results are shown again.
    """
    made = deploy("demo", TARGET, out=out, overrides=SMALL, progress=progress)
    files = [out / name for name in (RESULTS, PICTURE, PAGE)]
    if made.new or not all(file.is_file() for file in files):
        _compare(made, out, progress)
    _print(read_json(out / RESULTS), made)
    return made


def _compare(made: Deployment, out: Path, progress: Progress) -> None:
    """Measure all, and draw what there is to see."""
    validation = out / "validation"
    if not (validation / "annotations.json").is_file():
        write_coco(validation, SCENES, SIZE, first_seed=VALIDATION_SEED_START)
    minmax = {
        **load_target(TARGET).overrides(),
        "quantization.ranges": "minmax",
        "quantization.reconstruction": "none",
        "quantization.weights": "per_tensor",
    }
    noise = synthesize(
        "demo", load_recipe(RECIPE), images=64, init="uniform", iterations=0, labels="none",
        image_size=SIZE, out=out / "noise", progress=progress,
    )  # fmt: skip
    naive = quantize(
        load_recipe(RECIPE, minmax), model="demo", data=noise.root, out=out / "naive",
        progress=progress,
    )  # fmt: skip
    assert made.model is not None
    models: dict[str, Detecting] = {
        FLOAT: require_detector(load_model("demo")),
        NAIVE: require_detector(load_model(naive)),
        THIS: cast(Detecting, open_exported(made.model)),
    }
    results: dict[str, Any] = {}
    scenes = open_set(validation)
    detections: dict[str, list[Detections]] = {}
    for name, model in models.items():
        with progress.task(f"evaluation ({name})", len(scenes), "images") as task:
            detections[name] = predict(model, scenes, progress=task.update)
        measured = score(scenes, detections[name], list(model.names))
        results[name] = {"AP": measured.AP, "AP50": measured.AP50}
    for row in results.values():
        row["kept"] = row["AP"] / results[FLOAT]["AP"]
    picture = _picture(scenes, detections, results, CalibrationSet.open(Path(made.figures["set"])))
    write_atomic(out / PICTURE, picture)
    # Not above: what draws is slow to import.
    from .report import report

    networks = {
        FLOAT: require_detector(load_model("demo")),
        NAIVE: load_run(naive),
        THIS: load_run(out / "run"),
    }
    costs = {name: cost_of(list_layers(network)) for name, network in networks.items()}
    report(out / "run", out / PAGE, comparison=_comparison(results, costs))
    write_json(out / RESULTS, results)


def _comparison(results: dict[str, Any], costs: dict[str, Any]) -> Comparison:
    """What was measured, as the page shows it; by network."""
    return Comparison(
        [
            Compared(
                _COLUMNS[name],
                row["AP"],
                row["AP50"],
                this=name == THIS,
                before=name == FLOAT,
                cost=costs[name],
            )
            for name, row in results.items()
        ],
        data=f"{SCENES} scenes that none of them ever saw",
        source=f"{RESULTS} of the demo",
        command="dfq demo",
    )


def _picture(
    scenes: ImageSet,
    detections: dict[str, list[Detections]],
    results: dict[str, Any],
    made: CalibrationSet,
) -> bytes:
    """What there is to see, a PNG file."""
    # The first that show something to compare: not chosen by what was detected.
    scene_indices = [index for index, item in enumerate(scenes.items) if 3 <= len(item.boxes) <= 5]
    before, after = results[FLOAT], results[THIS]
    where = f"on {len(scenes)} unseen scenes"
    columns = (
        Column("The float network", f"AP {before['AP']:.3f} {where}", detections[FLOAT]),
        Column(
            "The INT8 file, in onnxruntime",
            f"AP {after['AP']:.3f}, {after['kept']:.1%} of the float one's",
            detections[THIS],
        ),
    )
    picture = draw_picture(scenes, scene_indices[:SHOWN], columns, made)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _print(results: dict[str, Any], made: Deployment) -> None:
    console = Console()
    for line in made.said:
        console.print(line, highlight=False, markup=False)
    table = Table(title=f"demo detector on {SCENES} unseen scenes")
    table.add_column("network")
    for column in ("AP", "AP50", "AP kept"):
        table.add_column(column, justify="right")
    for name, row in results.items():
        table.add_row(name, f"{row['AP']:.3f}", f"{row['AP50']:.3f}", f"{row['kept']:.1%}")
    console.print(table)
    for description, path in (
        ("the page of it, to open in a browser", made.folder / PAGE),
        ("what both networks detect, side by side", made.folder / PICTURE),
        ("the quantized network, for onnxruntime", made.model),
    ):
        console.print(f"{description}: {path}", highlight=False, markup=False)

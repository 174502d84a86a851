"""What accuracy low-bit training keeps: widths by methods, and ablations, on real images.

    python -m benchmarks.accuracy.qat --model yolov5n.pt --train coco-train --val coco-val \\
      --out bench --size 320 --rows w4a8,w4a4 --columns ptq-synthetic,lsq-real,ours-same,ours

Sets, runs and scores stay in the output folder: what is there is not made again, and an interrupted
bench goes on where it was. Prints Markdown; beside each AP its 95 % interval over the choice of
validation images (bootstrap), which no training sees.
"""

from __future__ import annotations

import hashlib
import json
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
from dfq.data.readers import ImageSet, open_set
from dfq.evaluation.coco import bootstrap_ap, predict, score
from dfq.models import load_detector, require_detector
from dfq.recipe import Recipe, load_recipe
from dfq.runs.loading import load_model
from dfq.runtime.files import read_json, write_json
from dfq.runtime.progress import Live

PTQ = ("method=ptq", "quantization.reconstruction=none", "quantization.refine_images=0")

# Weights that are trained from where they are nearest to, as everywhere but in our recipes.
TRAINED = (
    "quantization.reconstruction=none",
    "distillation.weight_lr=null",
    "distillation.lr=1e-4",
    "distillation.scale_lr=1e-3",
    "distillation.precision=float32",
    "distillation.epochs=30",
)

# The papers' own ingredients: a scale a tensor, initial steps by their rule, the task's loss alone.
# And trained in any case: with that loss a network may well end further from the float one.
LSQ = [
    *TRAINED,
    "method=qat",
    "distillation.keep_worse=true",
    "quantization.weights=per_tensor",
    "quantization.weight_grid=symmetric",
    "quantization.ranges=lsq",
    "distillation.zero_lr=1e-3",
    "distillation.weights.task=1",
    "distillation.weights.kl=0",
    "distillation.weights.feature=0",
    "distillation.ema=0",
]


@dataclass(frozen=True)
class Method:
    """A column of the table.

    Attributes:
        title: over the column.
        data: "noise", "synthetic", "same" (synthetic, as many as there are real ones), "real".
        settings: beside the recipe of the row.
        synthesis: beside the settings of the set, which is then one of its own.
    """

    title: str
    data: str
    settings: tuple[str, ...] = ()
    synthesis: tuple[str, ...] = ()


COLUMNS = {
    "ptq-noise": Method("PTQ, MSE ranges, noise", "noise", PTQ),
    "ptq-synthetic": Method("PTQ, MSE ranges, synthetic", "synthetic", PTQ),
    "gptq-synthetic": Method("PTQ, GPTQ rounding, synthetic", "synthetic", ("method=ptq",)),
    "lsq-real": Method("LSQ, {real} real", "real", (*LSQ, "quantization.activations=symmetric")),
    "lsqplus-real": Method("LSQ+, {real} real", "real", tuple(LSQ)),
    "ours-real": Method("ours, {real} real", "real"),
    "ours-same": Method("ours, {real} synthetic", "same"),
    "ours": Method("ours, {images} synthetic", "synthetic"),
}

ABLATIONS = {
    "without-kl": Method("no prediction term", "synthetic", ("distillation.weights.kl=0",)),
    "without-feature": Method("no feature term", "synthetic", ("distillation.weights.feature=0",)),
    # The paper's: 0.04 of a loss that is scaled by the batch, 32.
    "with-task": Method("task term, 1.28", "synthetic", ("distillation.weights.task=1.28",)),
    "paper-kl": Method(
        "the paper's KL",
        "synthetic",
        (
            "distillation.kl_form=flattened",
            "distillation.temperature=4",
            "distillation.weights.kl=0.1",
        ),
    ),
    "per-tensor": Method("a scale a tensor", "synthetic", ("quantization.weights=per_tensor",)),
    "symmetric": Method(
        "symmetric activations", "synthetic", ("quantization.activations=symmetric",)
    ),
    "symmetric-weights": Method(
        "symmetric weights", "synthetic", ("quantization.weight_grid=symmetric",)
    ),
    "least-squares": Method(
        "ranges by least squares alone", "synthetic", ("quantization.refine_images=0",)
    ),
    "nearest": Method("nearest rounding", "synthetic", ("quantization.reconstruction=none",)),
    "weights": Method("nearest rounding, trained weights", "synthetic", TRAINED),
    "task-agnostic": Method("task-agnostic images", "synthetic", (), ("synthesis.labels=none",)),
    "single-box": Method("single-box labels", "synthetic", (), ("synthesis.labels=single",)),
}


@dataclass
class Bench:
    """The experiment: what to make where, each thing once."""

    model: str
    train: str
    val: str
    out: Path
    size: int
    images: int
    overrides: tuple[str, ...]

    def __post_init__(self) -> None:
        self.data: ImageSet = open_set(self.val)
        self.real = len(open_set(self.train))
        self.live = Live()

    def recipe(self, row: str, *settings: str) -> Recipe:
        common = [f"synthesis.image_size={self.size}", f"synthesis.images={self.images}"]
        return load_recipe(row, [*common, *self.overrides, *settings])

    def set_for(self, method: Method) -> Path:
        """The folder of the images a method learns from, made if it is not there."""
        if method.data == "real":
            return Path(self.train)
        settings = list(method.synthesis)
        if method.data == "same":
            settings.append(f"synthesis.images={self.real}")
        if method.data == "noise":
            settings += [
                "synthesis.images=64", "synthesis.iterations=0", "synthesis.labels=none",
            ]  # fmt: skip
        # Of the default recipe: rows share their sets, whatever a recipe says of its own.
        wanted = self.recipe("w4a8", *settings)
        text = json.dumps(wanted.synthesis.model_dump(mode="json"), sort_keys=True)
        folder = self.out / "sets" / hashlib.sha256(text.encode()).hexdigest()[:12]
        return synthesize(self.model, wanted, out=folder, progress=self.live).root

    def run(self, row: str, name: str, method: Method) -> dict[str, Any]:
        """Train and measure one cell of the table, or find what was measured."""
        recipe = self.recipe(row, *method.settings)
        folder = self.out / "runs" / f"{row}-{name}"
        quantize(
            recipe,
            model=self.model,
            data=self.set_for(method),
            out=folder,
            progress=self.live,
        )
        return self.score(folder, folder / "score.json")

    def score(self, source: str | Path, file: Path) -> dict[str, Any]:
        """AP with its interval, AP50; kept in `file` with what it was measured on."""
        wanted = {"data": str(self.val), "images": len(self.data), "size": self.size}
        if file.is_file():
            found = read_json(file)
            if all(found.get(key) == value for key, value in wanted.items()):
                return dict(found)
        detector = require_detector(load_model(source))
        detections = predict(detector, self.data, image_size=self.size)
        metrics = score(self.data, detections, detector.names)
        low, high = bootstrap_ap(self.data, detections, detector.names)
        result = {**wanted, "AP": metrics.AP, "low": low, "high": high, "AP50": metrics.AP50}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
        return result


def cell(found: dict[str, Any], reference: float) -> str:
    """AP, its interval, and the share of the float network's that is kept."""
    kept = f", {found['AP'] / reference:.1%}" if reference > 0 else ""
    return f"{found['AP']:.3f} ({found['low']:.3f} to {found['high']:.3f}){kept}"


@benchmark(__doc__)
@model_option
@click.option("--train", required=True, help="A labelled SET of real images to train on.")
@click.option("--val", required=True, help="A labelled SET that everything is measured on.")
@out_option
@click.option("--size", default=640, show_default=True, help="Side in pixels, everywhere.")
@click.option("--images", default=512, show_default=True, help="Synthetic images.")
@click.option("--rows", default="w8a8,w6a6,w5a5,w4a8,w4a4", show_default=True, help="Recipes.")
@click.option("--columns", default=",".join(COLUMNS), show_default=True, help="Methods.")
@click.option("--ablation-rows", default="w4a8,w4a4", show_default=True, help="Recipes.")
@click.option("--ablations", default=",".join(ABLATIONS), show_default=True, help="Or '' for none.")
@set_option
def main(
    model: str,
    train: str,
    val: str,
    out: Path,
    size: int,
    images: int,
    rows: str,
    columns: str,
    ablation_rows: str,
    ablations: str,
    overrides: tuple[str, ...],
) -> None:
    methods = names(columns, COLUMNS, "--columns")
    removed = names(ablations, ABLATIONS, "--ablations")
    bench = Bench(model, train, val, out, size, images, overrides)
    load_detector(model).check_size(size, "--size")
    reference = bench.score(model, out / "float.json")
    print(f"{reference['images']} images at {size} px; float: {cell(reference, 0)}\n", flush=True)
    if methods:
        titles = [COLUMNS[m].title.format(real=bench.real, images=images) for m in methods]
        print(header("bits", *titles), flush=True)
    for row in rows.split(",") if methods else []:
        cells = [cell(bench.run(row, m, COLUMNS[m]), reference["AP"]) for m in methods]
        print(line(row.upper(), *cells), flush=True)
    if not removed:
        return
    recipes = [name for name in ablation_rows.split(",") if name]
    print("\n" + header("", *(name.upper() for name in recipes)), flush=True)
    everything = {"ours": COLUMNS["ours"], **{name: ABLATIONS[name] for name in removed}}
    for name, method in everything.items():
        cells = [cell(bench.run(row, name, method), reference["AP"]) for row in recipes]
        print(line(method.title.format(images=images), *cells), flush=True)


if __name__ == "__main__":
    main()

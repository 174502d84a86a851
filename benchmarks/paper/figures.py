"""The figures of the ICCV 2025 paper (arXiv 2507.16782), as files.

    python -m benchmarks.paper.figures --model yolov5n.pt --real coco-train --val coco-val \\
      --out paper --images 256 --iterations 500 --epochs 20 --size 320 --family face=face.pt

Of the same sets and figures as the tables, which are made where they are missing: give the same
options. The files are in OUT/figures: kinds.jpg (figure 1: real images, noise, images without and
with labels), families.jpg (4 and 7), labels.jpg (5: labels as the label stage goes on),
categories.png (3b), adaptive.jpg (8: against several random boxes), detections.jpg (9: of the float
network and of low-bit ones), convergence.png (6). Prints their names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.common import benchmark, names, pairs
from benchmarks.paper import charts
from benchmarks.paper.conditions import OURS, PAPER, Conditions, paper_recipe, with_conditions
from benchmarks.paper.definitions import (
    AGNOSTIC,
    CONVERGENCE,
    LABELS,
    NOISE,
    OUR_WHOLE,
    WHOLE,
    Row,
)
from benchmarks.paper.engine import Bench
from benchmarks.paper.label_stage import watch
from benchmarks.paper.pictures import Tile, detected, labelled, save, sheet
from benchmarks.paper.sets import Sets
from dfq.data.letterbox import load_letterboxed
from dfq.evaluation.agreement import REFERENCE_SCORE
from dfq.evaluation.coco import predict
from dfq.evaluation.label_fidelity import jensen_shannon
from dfq.models import require_detector
from dfq.models.base import Detector
from dfq.runs.loading import load_model
from dfq.synthesis.adaptive_labels import update_steps
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.labels import RealLabels

MOMENTS = 5
"""Columns of the figure of labels as the label stage goes on."""


@dataclass
class Figures:
    """What the figures are drawn from.

    Attributes:
        bench: sets, runs and figures.
        seeds: of the curves; the pictures are of the first one.
        width: of the low-bit networks.
        count: images in a row.
        families: further detectors by name.
    """

    bench: Bench
    seeds: Sequence[int]
    width: str
    count: int
    families: dict[str, str]

    @property
    def names(self) -> Sequence[str]:
        return self.bench.sets.detector.names

    def tiles(self, row: Row, sets: Sets | None = None) -> list[Tile]:
        """The first images of a row's synthetic set."""
        sets = sets or self.bench.sets
        data = sets.open(row, self.width, self.seeds[0])
        chosen = list(range(min(self.count, len(data))))
        return [
            labelled(pixels, data.labels[index], sets.detector.names)
            for index, pixels in zip(chosen, data.load(chosen), strict=True)
        ]

    def kinds(self, file: Path) -> None:
        """Real images, noise, and images without and with labels."""
        real, detector = self.bench.real, self.bench.sets.detector
        chosen = list(range(min(self.count, len(real))))
        images, targets, _ = load_letterboxed(
            real,
            chosen,
            self.bench.conditions.size,
            detector.stride,
            mapping=real.category_mapping(self.names),
        )
        real_tiles = [
            labelled((pixels * 255).round().to(torch.uint8), rows, self.names)
            for pixels, rows in zip(images, targets.per_image(len(chosen)), strict=True)
        ]
        rows = [
            ("real images", real_tiles),
            ("Gaussian noise", self.tiles(NOISE)),
            ("task-agnostic", self.tiles(AGNOSTIC)),
            ("task-specific, the paper's", self.tiles(WHOLE)),
            ("task-specific, ours", self.tiles(OUR_WHOLE)),
        ]
        save(sheet(rows), file)

    def of_families(self, file: Path) -> None:
        """Images of each detector, by the paper's recipe and by ours."""
        conditions = self.bench.conditions
        detectors = [(Path(conditions.model).stem, self.bench.sets)]
        for name, model in self.families.items():
            sets = Sets(replace(conditions, model=model))
            sets.detector.check_size(conditions.size, f"--family {name}: --size")
            sets.conditions = replace(sets.conditions, paper=paper_recipe(sets.detector))
            detectors.append((name, sets))
        rows = [
            (f"{name}, {title}", self.tiles(row, sets))
            for name, sets in detectors
            for title, row in (("the paper's recipe", WHOLE), ("ours", OUR_WHOLE))
        ]
        save(sheet(rows), file)

    def labels(self, file: Path) -> None:
        """Labels and images as the label stage goes on; a row of tiles is one image."""
        rows: list[tuple[str, list[Tile]]] = []
        for title, recipe in (("the paper's sampler", PAPER), ("ours", OURS)):
            made = self.bench.conditions.recipe(recipe, self.width, self.seeds[0], [])
            settings, stage = made.synthesis, made.synthesis.label_stage
            updates = update_steps(
                stage.iterations, start=stage.start, stop=stage.stop, updates=stage.updates
            )
            # The beginning; then from the first update on.
            spread = np.linspace(min(updates) + 1, stage.iterations, MOMENTS - 1)
            looks = {0, *(round(step) for step in spread)}
            batch = min(settings.batch_size, settings.images)
            inversion = Inversion(self.bench.sets.detector.clone(), settings)
            moments = watch(inversion, settings, batch, self.seeds[0], moments=looks)
            for index in range(min(max(1, self.count // 2), batch)):
                tiles = [labelled(m.images[index], m.labels[index], self.names) for m in moments]
                told = ", ".join(str(moment.iterations) for moment in moments)
                heading = f"{title}, after {told} iterations" if index == 0 else ""
                rows.append((heading, tiles))
        save(sheet(rows), file)

    def categories(self, file: Path) -> None:
        """How frequent the categories are in the real set and in synthetic ones."""

        def counted(labels: Sequence[torch.Tensor]) -> np.ndarray:
            of_objects = torch.cat(list(labels))[:, 0].long()
            return torch.bincount(of_objects, minlength=len(self.names)).numpy()

        real = counted(RealLabels(self.bench.real, self.names).labels)
        sets = {}
        for title, row in (
            ("random boxes", LABELS.rows["multi"]),
            ("the paper's sampler", WHOLE),
            ("ours", OUR_WHOLE),
        ):
            counts = counted(self.bench.sets.open(row, self.width, self.seeds[0]).labels)
            apart = jensen_shannon(counts, real)
            sets[f"{title}: {apart:.3f} bits apart, {counts.sum()} objects"] = counts
        charts.categories(real, sets, self.names, file)

    def adaptive(self, file: Path) -> None:
        """Images of adaptive labels and of several random boxes."""
        rows = [
            ("several random boxes", self.tiles(LABELS.rows["multi"])),
            ("adaptive, the paper's", self.tiles(WHOLE)),
            ("adaptive, ours", self.tiles(OUR_WHOLE)),
        ]
        save(sheet(rows), file)

    def detections(self, file: Path) -> None:
        """What the float network and low-bit ones detect in the first images with objects."""
        bench = self.bench
        chosen = [index for index, item in enumerate(bench.val.items) if len(item.boxes)]
        photographs = bench.val.only(chosen[: self.count])
        images = [photographs.load_image(index) for index in range(len(photographs))]
        rows = []
        for title, detector in (
            ("float", bench.teacher),
            *(
                (f"{self.width.upper()}, {title}", self._network(row))
                for title, row in (("the paper's recipe", WHOLE), ("ours", OUR_WHOLE))
            ),
        ):
            answers = predict(detector, photographs, image_size=bench.conditions.size)
            tiles = [
                detected(pixels, answer, self.names, REFERENCE_SCORE)
                for pixels, answer in zip(images, answers, strict=True)
            ]
            rows.append((title, tiles))
        save(sheet(rows), file)

    def _network(self, row: Row) -> Detector:
        return require_detector(load_model(self.bench.run(row, self.width, self.seeds[0])))

    def convergence(self, file: Path) -> None:
        """AP after each epoch of training."""
        bench = self.bench
        curves = {
            bench.title(row): [bench.cell(row, self.width, seed)["by_epoch"] for seed in self.seeds]
            for row in CONVERGENCE.rows.values()
        }
        charts.convergence(curves, bench.reference()["AP"], file)


DRAWN: dict[str, tuple[str, Callable[[Figures, Path], None]]] = {
    "kinds": ("kinds.jpg", Figures.kinds),
    "families": ("families.jpg", Figures.of_families),
    "labels": ("labels.jpg", Figures.labels),
    "categories": ("categories.png", Figures.categories),
    "adaptive": ("adaptive.jpg", Figures.adaptive),
    "detections": ("detections.jpg", Figures.detections),
    "convergence": ("convergence.png", Figures.convergence),
}


@benchmark(__doc__)
@with_conditions
@click.option("--figures", default=",".join(DRAWN), show_default=True, help="By commas.")
@click.option("--width", default="w4a8", show_default=True, help="Of the low-bit networks.")
@click.option(
    "--count", type=click.IntRange(1, 12), default=5, show_default=True, help="Images in a row."
)
@click.option(
    "--family", multiple=True, metavar="NAME=MODEL", help="A further detector for families.jpg."
)
def main(
    conditions: Conditions,
    seeds: tuple[int, ...],
    threads: int,
    figures: str,
    width: str,
    count: int,
    family: tuple[str, ...],
) -> None:
    torch.set_num_threads(threads)
    chosen = names(figures, DRAWN, "--figures")
    drawn = Figures(Bench(conditions), seeds, width, count, pairs(family, "--family"))
    # A mistake shows before anything is made.
    drawn.bench.name(WHOLE, width, seeds[0])
    folder = conditions.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        file, draw = DRAWN[name]
        draw(drawn, folder / file)
        click.echo(folder / file)


if __name__ == "__main__":
    main()

"""Low-bit networks from synthetic images, photographs and noise, over many networks.

    python -m benchmarks.accuracy.networks --network demo --network face=face.pt \\
      --network own=own.pt@640 --photos coco-val --photos voc --real coco-train --out networks

Each network is quantized without training (`method: ptq`) at each width on sets that dfq makes of
it, on photographs without their labels, and on uniform noise. What counts is how much of the float
network is left: the average precision against its own detections above 0.3, taken for labels, the
mean over the sets of photographs. It needs no labels, so any network can be asked. Of each set it
also measures how far the inputs of BatchNorm are from what they were in training, and whether that
tells how good the set is.

Sets and results stay in the output folder, each result is written at once, and what is there is not
made again: delete `results.jsonl` to measure another version of dfq on the same sets, and the whole
folder to make them anew. Prints Markdown, the worst first.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import torch

from benchmarks.accuracy.network_tables import JUDGED, Key, Results, Row, figure, report
from benchmarks.common import benchmark, out_option, pairs, results, set_option
from dfq.api.synthesize import synthesize
from dfq.data.image_set import ImageSet
from dfq.data.pixels import LabelledImages
from dfq.data.readers import open_set
from dfq.data.training_images import LetterboxedImages
from dfq.evaluation.agreement import pseudo_labelled, unlabelled
from dfq.evaluation.coco import plain, predict, score
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.models.base import Detections, Detector
from dfq.ptq.pipeline import quantized
from dfq.recipe import load_recipe
from dfq.runtime.files import append_line, plain_name
from dfq.runtime.progress import Silent
from dfq.synthesis.quality import set_quality

LARGEST_SIDE = 320
"""Pixels: networks for larger images are measured at this side unless it is given."""

WIDTHS = ("w8a8", "w6a6", "w4a8", "w4a4")


@dataclass(frozen=True)
class Network:
    """One to measure.

    Attributes:
        name: in tables and folders.
        source: a file, or "demo".
        image_size: side in pixels; None: its own, `LARGEST_SIDE` at most.
        labelled: a set whose labels it is measured with too.
    """

    name: str
    source: str
    image_size: int | None = None
    labelled: str | None = None

    @classmethod
    def parse(cls, text: str, labelled: dict[str, str]) -> Network:
        """From NAME=FILE[@IMAGE_SIZE]; a NAME alone is its own FILE."""
        name, named, source = text.partition("=")
        file, _, side = (source if named else name).rpartition("@")
        if not (file and side.isdecimal()):
            file, side = source if named else name, ""
        name = name if named else file
        if not plain_name(name) or not file:
            raise click.UsageError(f"--network {text}: give NAME=FILE, NAME that of a folder")
        return cls(name, file, int(side) if side else None, labelled.get(name))


@dataclass(frozen=True)
class Settings:
    """What is the same for all networks.

    Attributes:
        photos: sets that agreement is measured on.
        real: photographs to calibrate on.
        out: folder of sets and results.
        images: of every calibration set.
        seeds: of synthetic sets, and of which photographs are drawn.
        widths: recipes, as "w4a8".
        overrides: changes to all recipes.
    """

    photos: tuple[str, ...]
    real: str
    out: Path
    images: int
    seeds: tuple[int, ...]
    widths: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    def sources(self) -> list[tuple[str, int]]:
        """Source and seed of all calibration sets of a network."""
        drawn = [(source, seed) for source in ("synthetic", "photographs") for seed in self.seeds]
        return [*drawn, ("noise", 0)]


def own_results(path: Path, identities: Sequence[Row]) -> Results:
    """The results so far of certain networks and settings.

    Args:
        path: of the results.
        identities: `Bench.identity` of each network.
    """
    found: Results = {}
    for row in results(path):
        if row["identity"] in identities:
            found[row["network"], row["source"], row["seed"], row["width"]] = row
    return found


class Yardstick:
    """What low-bit networks are measured against: the float network's detections.

    Args:
        teacher: folded.
        photos: sets of photographs.
        labelled: a set with labels, or None.
        image_size: pixels of the long side.
    """

    def __init__(
        self, teacher: Detector, photos: Sequence[str], labelled: str | None, image_size: int
    ) -> None:
        self.teacher, self.image_size = teacher, image_size
        self.photos, self.labelled = photos, labelled
        sources = [*photos, labelled] if labelled else photos
        self.sets = {source: open_set(source) for source in sources}

    def _detections(self, detector: Detector) -> dict[str, list[Detections]]:
        return {
            source: predict(detector, images, image_size=self.image_size)
            for source, images in self.sets.items()
        }

    @cached_property
    def _float(self) -> dict[str, list[Detections]]:
        return self._detections(self.teacher)

    @cached_property
    def _references(self) -> list[ImageSet]:
        return [
            pseudo_labelled(self.sets[source], self._float[source], len(self.teacher.names))
            for source in self.photos
        ]

    def measure(self, student: Detector) -> Row:
        """Agreement, a fraction in [0, 1]: the mean over the sets on which the float network
        detects something, and on each; NaN where it detects nothing. With labels also the average
        precision of both networks.
        """
        found = self._detections(student)
        by_set = [
            score(reference, found[source], reference.names).AP
            for source, reference in zip(self.photos, self._references, strict=True)
        ]
        known = [value for value in by_set if not math.isnan(value)]
        row: Row = {
            "agreement": statistics.fmean(known) if known else math.nan,
            "by_set": tuple(by_set),
        }
        if self.labelled is not None:
            images, names = self.sets[self.labelled], self.teacher.names
            row["AP"] = score(images, found[self.labelled], names).AP
            row["AP_float"] = score(images, self._float[self.labelled], names).AP
        return row


class Bench:
    """All measurements of one network."""

    def __init__(self, network: Network, settings: Settings) -> None:
        self.network, self.settings = network, settings
        self.detector = load_detector(network.source)
        self.size = network.image_size or min(self.detector.image_size, LARGEST_SIDE)
        self.detector.check_size(self.size)
        self.teacher = fold(self.detector.clone())
        self.yardstick = Yardstick(self.teacher, settings.photos, network.labelled, self.size)

    def identity(self) -> Row:
        """Whatever else a result depends on: one under others is no result of this bench."""
        return {
            "network": self.network.name,
            "fingerprint": self.detector.fingerprint,
            "image_size": self.size,
            "images": self.settings.images,
            "photos": list(self.settings.photos),
            "real": self.settings.real,
            "labelled": self.network.labelled,
            "set": list(self.settings.overrides),
        }

    def calibration(self, source: str, seed: int) -> LabelledImages:
        """One of the sets to calibrate on."""
        settings = self.settings
        if source == "photographs":
            chosen = unlabelled(open_set(settings.real).subset(settings.images, seed=seed))
            return LetterboxedImages(chosen, self.detector, self.size)
        noise = source == "noise"
        return synthesize(
            self.network.source,
            # Of the recipes' synthesis all are alike.
            load_recipe(JUDGED, settings.overrides),
            out=settings.out / "sets" / f"{self.network.name}-{source}-{seed}",
            images=settings.images,
            image_size=self.size,
            init="uniform" if noise else None,
            iterations=0 if noise else None,
            labels="none" if noise else None,
            seed=seed,
            workers=1,
        )

    def missing(self) -> Iterator[tuple[Key, LabelledImages]]:
        """Key of each result that is not there, and the set that it is of."""
        there = set(own_results(self.settings.results, [self.identity()]))
        for source, seed in self.settings.sources():
            widths = (None, *self.settings.widths)
            keys = [(self.network.name, source, seed, width) for width in widths]
            if there.issuperset(keys):
                continue
            data = self.calibration(source, seed)
            for key in keys:
                if key not in there:
                    yield key, data

    def measure(self, width: str | None, data: LabelledImages) -> Row:
        """The figures of a set, or of the low-bit network that it makes."""
        if width is None:
            return self.quality(data)
        recipe = load_recipe(width, ["method=ptq", *self.settings.overrides])
        return self.yardstick.measure(
            quantized(
                self.teacher, recipe.quantization.policy(), recipe.quantization, data, Silent()
            )
        )

    def quality(self, data: LabelledImages) -> Row:
        """How far BatchNorm's inputs on a set are from those in training; empty without any."""
        found = set_quality(self.detector, data.load(list(range(len(data)))))
        if found is None:
            return {}
        return {
            "worst_log_variance": found.worst_log_variance,
            "mean_log_variance": statistics.fmean(abs(one.log_variance) for one in found.layers),
            "worst_shift": found.worst_shift,
            "warnings": found.warnings(),
        }

    def run(self) -> None:
        """Measure what is missing; each result is written at once."""
        identity = self.identity()
        for key, data in self.missing():
            network, source, seed, width = key
            found = self.measure(width, data)
            row = {"network": network, "source": source, "seed": seed, "width": width, **found}
            row = {name: plain(value) for name, value in row.items()}
            append_line(self.settings.results, json.dumps({**row, "identity": identity}))
            if width is not None:
                value = figure(row["agreement"])
                click.echo(f"{network}, {source} {seed}, {width}: {value}", err=True)


def measure_network(network: Network, settings: Settings) -> Row:
    """Measure what is missing of one network, on one core; returns its `Bench.identity`."""
    torch.set_num_threads(1)
    bench = Bench(network, settings)
    bench.run()
    return bench.identity()


@benchmark(__doc__)
@click.option(
    "--network", "networks", multiple=True, required=True, metavar="NAME=FILE[@IMAGE_SIZE]",
    help=f"Repeated; demo is one too. Its own size by default, {LARGEST_SIDE} px at most.",
)  # fmt: skip
@click.option("--photos", multiple=True, required=True, help="To measure on. Repeated.")
@click.option("--real", required=True, help="Photographs to calibrate on, not those of --photos.")
@out_option
@click.option("--labelled", multiple=True, metavar="NAME=SET", help="Measure its AP on labels too.")
@click.option("--images", default=64, show_default=True, help="Of each calibration set.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1), show_default=True)
@click.option("--width", "widths", multiple=True, default=WIDTHS, show_default=True)
@click.option("--workers", default=1, show_default=True, help="Networks at a time, a core each.")
@set_option
def main(
    networks: tuple[str, ...],
    photos: tuple[str, ...],
    real: str,
    out: Path,
    labelled: tuple[str, ...],
    images: int,
    seeds: tuple[int, ...],
    widths: tuple[str, ...],
    workers: int,
    overrides: tuple[str, ...],
) -> None:
    sets = pairs(labelled, "--labelled")
    chosen = [Network.parse(text, sets) for text in networks]
    names = [network.name for network in chosen]
    if len(set(names)) < len(names):
        raise click.UsageError("--network: two of them have one name")
    for name in sets:
        if name not in names:
            raise click.UsageError(f"--labelled {name}: give NAME=SET, NAME one of the networks")
    settings = Settings(photos, real, out, images, seeds, widths, overrides)
    # A mistake shows before anything is made.
    for width in widths:
        load_recipe(width, ["method=ptq", *overrides])
    out.mkdir(parents=True, exist_ok=True)
    measured = own_results(settings.results, measure_all(chosen, settings, workers))
    wanted = {
        (name, source, seed, width): measured[name, source, seed, width]
        for name in names
        for source, seed in settings.sources()
        for width in (None, *widths)
    }
    click.echo("\n".join(report(wanted, names, list(sets), seeds)))


def measure_all(networks: Sequence[Network], settings: Settings, workers: int) -> list[Row]:
    """`measure_network` of all, in processes of their own if there are to be several."""
    if workers == 1:
        return [measure_network(network, settings) for network in networks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = [pool.submit(measure_network, network, settings) for network in networks]
        return [one.result() for one in waiting]


if __name__ == "__main__":
    main()

"""Trains a row's network and measures it; keeps each figure at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from benchmarks.common import results
from benchmarks.paper.conditions import Conditions
from benchmarks.paper.definitions import Row
from benchmarks.paper.sets import Sets, digest
from dfq.api.quantize import quantize
from dfq.data.readers import open_set
from dfq.data.training_images import LetterboxedImages
from dfq.evaluation.coco import plain, predict, score
from dfq.evaluation.coco_matching import require_labels
from dfq.evaluation.divergence import mean_divergence
from dfq.evaluation.operating_point import best_f1
from dfq.evaluation.voc import voc_ap50
from dfq.graph.fold_batchnorm import fold
from dfq.models import require_detector
from dfq.models.base import Detector
from dfq.recipe import Recipe
from dfq.runs.loading import load_model
from dfq.runtime.files import append_line, read_json

Figures = dict[str, Any]
"""AP, AP50, AP50_voc, F1, F1_threshold, divergence; None where undefined. Of the table by epoch
also by_epoch, AP after each."""


class Bench:
    """Figures under some conditions, each found once: those of `results.jsonl` are not made again,
    whichever table they were made for."""

    def __init__(self, conditions: Conditions) -> None:
        self.conditions, self.sets = conditions, Sets(conditions)
        self.teacher = fold(self.sets.detector.clone())
        self.val, self.real = open_set(conditions.val), open_set(conditions.real)
        for images in (self.val, self.real):
            require_labels(images)
        self.pixels = LetterboxedImages(self.val, self.teacher, conditions.size)
        self.file = conditions.out / "results.jsonl"
        self.known: dict[str, Figures] = {row["cell"]: row for row in results(self.file)}

    def title(self, row: Row) -> str:
        """With the numbers of images in it."""
        return row.title.format(real=len(self.real), images=self.conditions.images)

    def recipe(self, row: Row, width: str, seed: int) -> Recipe:
        """How a row's network is made."""
        size = f"evaluation.image_size={self.conditions.size}"
        settings = [size, *self.sets.filled(row.settings)]
        return self.conditions.recipe(row.recipe, width, seed, settings)

    def name(self, row: Row, width: str, seed: int) -> str:
        """The same for rows that are made and measured alike, in whatever table."""
        conditions = self.conditions
        data: Any = [conditions.real, len(self.real)]
        if row.data != "real":
            data = self.sets.name(row, width, seed)
        training = self.recipe(row, width, seed).model_dump(mode="json")
        # Of that section the training takes the size alone, which `evaluation` has too.
        training.pop("synthesis")
        fingerprint = self.sets.detector.fingerprint
        return digest([fingerprint, data, training, conditions.val, len(self.val)])

    def cell(self, row: Row, width: str, seed: int) -> Figures:
        """The figures of one row, width and seed."""
        name = self.name(row, width, seed)
        if name not in self.known:
            run = self.run(row, width, seed)
            figures = self.measure(require_detector(load_model(run)))
            history = read_json(run / "metrics.json").get("history", [])
            if history and all("score" in epoch for epoch in history):
                figures["by_epoch"] = [epoch["score"] for epoch in history]
            self._keep(name, {"row": self.title(row), "width": width, "seed": seed, **figures})
            shutil.rmtree(run)
        return self.known[name]

    def run(self, row: Row, width: str, seed: int) -> Path:
        """The run folder of a row's network, made if it is not there."""
        data = self.sets.folder(row, width, seed)
        folder = self.conditions.out / "runs" / self.name(row, width, seed)
        recipe = self.recipe(row, width, seed)
        return quantize(recipe, model=self.conditions.model, data=data, out=folder)

    def reference(self) -> Figures:
        """The figures of the float network."""
        fingerprint, conditions = self.sets.detector.fingerprint, self.conditions
        name = digest(["float", fingerprint, conditions.val, len(self.val), conditions.size])
        if name not in self.known:
            self._keep(name, {"row": "float", **self.measure(self.teacher)})
        return self.known[name]

    def measure(self, student: Detector) -> Figures:
        """Accuracy on the labelled images, and how far the predictions on them are from those of
        the float network."""
        names = student.names
        detections = predict(student, self.val, image_size=self.conditions.size)
        metrics = score(self.val, detections, names)
        best = best_f1(self.val, detections, names)
        figures = {
            "AP": metrics.AP,
            "AP50": metrics.AP50,
            "AP50_voc": voc_ap50(self.val, detections, names),
            "F1": best.f1,
            "F1_threshold": best.threshold,
            "divergence": mean_divergence(student, self.teacher, self.pixels),
        }
        return {key: plain(value) for key, value in figures.items()}

    def _keep(self, name: str, figures: Figures) -> None:
        self.known[name] = {"cell": name, **figures}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.file, json.dumps(self.known[name]))
        shown = {key: figures[key] for key in ("row", "width", "seed", "AP") if key in figures}
        click.echo(" ".join(str(value) for value in shown.values()), err=True)

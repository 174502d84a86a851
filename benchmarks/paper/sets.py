"""The synthetic sets of rows, each made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.conditions import Conditions
from benchmarks.paper.definitions import UNLABELLED, Row
from benchmarks.paper.label_stage import one_stage_set
from dfq.api.synthesize import synthesize
from dfq.data.calibration_set import CalibrationSet
from dfq.models import load_detector
from dfq.recipe import Recipe


def digest(value: Any) -> str:
    """Tells values apart that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


class Sets:
    """The sets of a detector, in the folder `sets` of all that is made."""

    def __init__(self, conditions: Conditions) -> None:
        self.conditions = conditions
        self.detector = load_detector(conditions.model)

    def filled(self, settings: Sequence[str]) -> list[str]:
        """Settings with the sets that they name."""
        paths = {"real": self.conditions.real, "val": self.conditions.val}
        return [text.format(**paths) for text in settings]

    def recipe(self, row: Row, width: str, seed: int) -> Recipe:
        """How a row's set is made."""
        # Recipes that train on objects refuse sets without any; of this one only the set is made.
        settings = [*UNLABELLED, *self.filled(row.synthesis)]
        return self.conditions.recipe(row.made_by, width, seed, settings)

    def name(self, row: Row, width: str, seed: int) -> str:
        """The same for rows whose sets are alike, whatever their widths and tables."""
        synthesis = self.recipe(row, width, seed).synthesis.model_dump(mode="json")
        return f"{digest([self.detector.fingerprint, row.data, synthesis])}-{seed}"

    def folder(self, row: Row, width: str, seed: int) -> Path:
        """Of the images a row's network is made on; synthetic ones are made if they are not
        there."""
        conditions = self.conditions
        if row.data == "real":
            return Path(conditions.real)
        recipe = self.recipe(row, width, seed)
        folder = conditions.out / "sets" / self.name(row, width, seed)
        if row.data == "one stage":
            return one_stage_set(conditions.model, recipe, folder).root
        return synthesize(conditions.model, recipe, out=folder, workers=1).root

    def open(self, row: Row, width: str, seed: int) -> CalibrationSet:
        """A row's synthetic set."""
        return CalibrationSet.open(self.folder(row, width, seed))

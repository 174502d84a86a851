"""What a classifier says of images, for people and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError, shown
from .classification import Agreed, divergences, top
from .prediction_list import PredictionList

KIND = "dfq classes"
"""What `classes.json` says that it is."""

LISTED = 5
"""Categories of an image that are listed, at most."""


@dataclass(frozen=True, eq=False)
class ClassPrediction:
    """What a classifier says of one image.

    Attributes:
        file: the image, as it was named or found.
        width, height: of it, pixels, EXIF orientation applied.
        logits: float32 `(classes,)`, finite.
        names: category names, by index.
        reference: what the float classifier says, where one was named to compare with.
    """

    file: str
    width: int
    height: int
    logits: Tensor
    names: Sequence[str]
    reference: ClassPrediction | None = None

    def top(self, count: int = LISTED) -> list[tuple[str, int, float]]:
        """The likeliest categories: name, index and probability, the likeliest first."""
        probabilities = self.logits.double().softmax(dim=0)
        labels = top(self.logits[None], count)[0].tolist()
        return [(self.names[label], label, float(probabilities[label])) for label in labels]

    def agreed(self) -> Agreed | None:
        """How it agrees with the float classifier's; None without one."""
        return None if self.reference is None else agreed([self])

    def lines(self) -> list[str]:
        """For people: a row a category."""
        rows = [(shown(name, limit=40), probability) for name, _, probability in self.top()]
        width = max(len(name) for name, _ in rows)
        return [
            f"{shown(self.file)} ({self.width} x {self.height})",
            *(f"  {name:<{width}}  {probability:.3f}" for name, probability in rows),
        ]

    def comparison(self) -> str:
        """For people: whether the float classifier finds the same category likeliest."""
        assert self.reference is not None
        ours, theirs = self.top(1)[0], self.reference.top(1)[0]
        verdict = "same" if ours[1] == theirs[1] else "differs"
        before, now = (f"{shown(row[0], limit=40)} {row[2]:.3f}" for row in (theirs, ours))
        return f"{verdict} (float network: {before}, this one: {now})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        document: dict[str, Any] = {
            "file": self.file,
            "width": self.width,
            "height": self.height,
            "classes": self._rows(),
        }
        if self.reference is not None:
            document["compare"] = {**agreed([self]).to_dict(), "float": self.reference._rows()}
        return document

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"category": name, "index": label, "probability": probability}
            for name, label, probability in self.top()
        ]


@dataclass(eq=False, repr=False, kw_only=True)
class ClassPredictions(PredictionList[ClassPrediction]):
    """A list of one `ClassPrediction` for each image that could be read; see `PredictionList`."""

    kind: ClassVar[str] = KIND

    def settings(self) -> dict[str, Any]:
        return {}

    def counts(self) -> dict[str, Any]:
        return agreed(self).to_dict()

    def summary(self) -> str:
        counted: dict[str, int] = {}
        for prediction in self:
            name = prediction.top(1)[0][0]
            counted[name] = counted.get(name, 0) + 1
        most = sorted(counted.items(), key=lambda row: -row[1])
        listed = ", ".join(f"{shown(name, limit=40)} {count}" for name, count in most[:LISTED])
        rest = sum(count for _, count in most[LISTED:])
        return f"likeliest: {listed}" + (f", others {rest}" if rest else "")

    def comparison(self) -> str:
        return agreed(self).sentence("these images")


def agreed(predictions: Sequence[ClassPrediction]) -> Agreed:
    """How predictions agree with the float classifier's, which each of them has."""
    pairs = [(p.logits, p.reference.logits) for p in predictions if p.reference is not None]
    ours, theirs = (torch.stack(rows) for rows in zip(*pairs, strict=True))
    same = int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
    return Agreed(len(pairs), same, round(float(divergences(ours, theirs).mean()), 6))


def require_finite(logits: Tensor, source: str) -> Tensor:
    """The logits, unless some are not finite.

    Raises:
        UserError: the model has diverged.
    """
    if not bool(logits.isfinite().all()):
        raise UserError(f"{shown(source)}: gives no finite predictions")
    return logits

"""How well a set meets what a network's BatchNorm layers know of its training data.

No real image is needed: each layer's running mean and variance are what the training images gave,
and a set that gives others lacks something, or has too much of it. Most telling is the first layer,
where a lack of contrast begins that clips the activations of all others on real images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.base import Model
from .losses.batchnorm import BatchNormStatistics, has_statistics

FIRST_BOUND, BOUND = 0.3, 0.6
"""Of shift and log variance ratio, beyond which the first layer, and any other, is warned of. Twice
what synthesis is to reach on networks for photographs, 0.15 and 0.25 (with room for small sets)."""

WORST = 3
"""Layers that are named."""


@dataclass(frozen=True)
class LayerQuality:
    """What one BatchNorm layer says.

    Attributes:
        name: as the network has it.
        shift: mean over the channels of |mean of the set - running mean|, in running standard
            deviations.
        log_variance: mean over the channels of ln(variance of the set / running variance); 0: as in
            training, -0.7: half of it.
    """

    name: str
    shift: float
    log_variance: float

    @property
    def off(self) -> float:
        """The larger of the two magnitudes."""
        return max(self.shift, abs(self.log_variance))


@dataclass(frozen=True)
class Quality:
    """What all layers say, in the order they run."""

    layers: list[LayerQuality]
    images: int

    @property
    def first(self) -> LayerQuality:
        """The layer that runs first."""
        return self.layers[0]

    def worst(self, count: int = WORST) -> list[LayerQuality]:
        """The layers that are furthest off, the worst first."""
        return sorted(self.layers, key=lambda layer: -layer.off)[:count]

    @property
    def worst_shift(self) -> float:
        """Largest shift of a layer."""
        return max(layer.shift for layer in self.layers)

    @property
    def worst_log_variance(self) -> float:
        """Largest magnitude of a log variance ratio."""
        return max(abs(layer.log_variance) for layer in self.layers)

    def warnings(self) -> list[str]:
        """What to worry about, a line each; none where all is well."""
        lines = []
        first = self.first
        if first.off > FIRST_BOUND:
            aspect = (
                "contrast" if abs(first.log_variance) >= first.shift else "colour or brightness"
            )
            way = "too little" if first.log_variance < 0 else "too much"
            lines.append(
                f"the first BatchNorm ({first.name}) sees other {aspect} than in training"
                + (f", {way} of it" if aspect == "contrast" else "")
                + f" ({_figures(first)}): on real images early activations may be clipped"
            )
        others = [layer for layer in self.worst(len(self.layers)) if layer.off > BOUND]
        others = [layer for layer in others if layer is not first]
        if others:
            named = ", ".join(f"{layer.name} ({_figures(layer)})" for layer in others[:WORST])
            lines.append(
                f"{len(others)} of {len(self.layers)} BatchNorm layers are far from their training "
                f"statistics, the worst: {named}"
            )
        if lines:
            lines[-1] += (
                "; more synthesis.iterations bring the set closer, and --photos DIR of a few real "
                "images tells whether it matters"
            )
        return lines

    def summary(self) -> str:
        """One line for people."""
        named = ", ".join(f"{layer.name} ({_figures(layer)})" for layer in self.worst())
        return (
            "BatchNorm, shift in sigmas and ln of the variance ratio: "
            f"first {_figures(self.first)}; worst {named}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `from_dict` reads it."""
        return {
            "images": self.images,
            "layers": [
                {"name": layer.name, "shift": layer.shift, "log_variance": layer.log_variance}
                for layer in self.layers
            ],
            "warnings": self.warnings(),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Quality:
        """Of what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: where it is not that.
        """
        layers = [
            LayerQuality(str(entry["name"]), float(entry["shift"]), float(entry["log_variance"]))
            for entry in values["layers"]
        ]
        if not layers:
            raise ValueError("no layers")
        return Quality(layers, int(values["images"]))


def quality_of(manifest: Mapping[str, Any]) -> Quality | None:
    """What the manifest of a calibration set says; None where it says nothing of it."""
    try:
        return Quality.from_dict(manifest["quality"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _figures(layer: LayerQuality) -> str:
    return f"{layer.shift:.2f}, {layer.log_variance:+.2f}"


@torch.no_grad()
def set_quality(detector: Model, images: Tensor, *, batch_size: int = 16) -> Quality | None:
    """Compare what a network's BatchNorm layers see in images with their running statistics.

    Args:
        detector: float; BatchNorm folded (`graph.fold_batchnorm.fold`) or not.
        images: uint8 `(n, 3, h, w)`, RGB.
        batch_size: images of one forward pass.

    Returns:
        The figures; None for a network without BatchNorm statistics, or without an image.

    Example:
        >>> quality = set_quality(detector, calibration.load(range(64)))
        >>> quality.first.log_variance
        -0.08
    """
    if len(images) == 0 or not has_statistics(detector.module):
        return None
    statistics = BatchNormStatistics(detector.module)
    with statistics:
        for batch in images.split(batch_size):
            detector.raw(batch.to(detector.device).float() / 255)
            statistics.gather()
        compared = statistics.compared()
    return Quality([LayerQuality(*row) for row in compared], len(images))

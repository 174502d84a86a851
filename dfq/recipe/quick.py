"""`--quick`: fewer and smaller images, fewer steps, for a first look or a machine without a GPU."""

from __future__ import annotations

from typing import Any

from ..models.base import Model
from ..runtime.settings import Section

QUICK: dict[str, int] = {
    "synthesis.images": 32,
    # As many batches as a laptop has cores to spare, or they would wait for one.
    "synthesis.batch_size": 16,
    "synthesis.iterations": 100,
    "synthesis.label_stage.iterations": 80,
    "quantization.rounding_images": 64,
    "quantization.reconstruction_iterations": 60,
    "distillation.epochs": 6,
}
"""The most of each that is left where neither an option nor `--set` says another; what they cost in
accuracy: docs/results/synthesis.md, "What --quick costs"."""

SIDE = 320
"""Pixels of the images' sides, at most, where no size is stated."""


def lower(data: dict[str, Any], kind: type[Section]) -> None:
    """Bring what a recipe has more of down to `QUICK`.

    Args:
        data: the recipe's sections, not yet checked; changed in place.
        kind: the recipe's model, whose defaults count where the recipe says nothing.
    """
    synthesis = data.get("synthesis")
    side = synthesis.get("image_size") if isinstance(synthesis, dict) else None
    if isinstance(synthesis, dict) and isinstance(side, int) and side > SIDE:
        # As if it said none.
        synthesis["image_size"] = None
    defaults = kind().model_dump()
    for key, most in QUICK.items():
        *above, name = key.split(".")
        section, default = data, defaults
        for part in above:
            default = default[part]
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                # Told of when all is checked.
                break
        else:
            value = section.get(name, default[name])
            if isinstance(value, int | float) and value > most:
                section[name] = most


def quick_side(model: Model) -> int:
    """Pixels of an image's side: the model's own, or the most of `SIDE` that its stride allows."""
    stride = model.stride
    return min(model.image_size, max(stride, SIDE // stride * stride))

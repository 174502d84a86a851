"""What would make long work shorter, told with the estimate of how long it takes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..models.base import Model
from ..recipe import Recipe
from ..recipe.quick import QUICK, quick_side


def ways_of_synthesis(recipe: Recipe, model: Model, workers: int | None = None) -> list[str]:
    """What makes a synthesis shorter.

    Args:
        recipe: the experiment.
        model: what images are made of, on its device.
        workers: processes that were asked for.
    """
    settings = recipe.synthesis
    fewer = {
        "fewer images": settings.images > QUICK["synthesis.images"],
        "a smaller image size": (settings.image_size or model.image_size) > quick_side(model),
        "fewer iterations": settings.iterations > QUICK["synthesis.iterations"],
    }
    ways = [way for way, is_left in fewer.items() if is_left]
    if ways:
        ways.append("--quick")
    if model.device.type == "cpu" and workers is not None and workers < (os.cpu_count() or 1):
        ways.append("more workers")
    return ways


def ways_of_quantization(recipe: Recipe, count: int) -> list[str]:
    """What makes a quantization shorter.

    Args:
        recipe: the experiment.
        count: images of the set.
    """
    section, ways = recipe.quantization, []
    images = min(section.rounding_images, count)
    if section.reconstruction != "none" and images > QUICK["quantization.rounding_images"]:
        ways.append("fewer images to round on (--quick, or quantization.rounding_images)")
    if section.reconstruction not in ("none", "gptq"):
        if section.reconstruction_iterations > QUICK["quantization.reconstruction_iterations"]:
            ways.append("fewer quantization.reconstruction_iterations")
        ways.append("quantization.reconstruction=gptq")
    if recipe.method != "ptq":
        ways += ["a smaller set", "fewer distillation.epochs", "dfq ptq, which does not train"]
    return ways


def shorter(ways: Sequence[str], model: Model) -> str:
    """The ways in a line, each once; empty where there are none.

    Args:
        ways: as those above give them.
        model: on its device.
    """
    every = list(dict.fromkeys([*ways, *(["a GPU"] if model.device.type == "cpu" else [])]))
    *first, last = every or [""]
    return f"shorter with {', '.join(first)}{' or ' if first else ''}{last}" if last else ""

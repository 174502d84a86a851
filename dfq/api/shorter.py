"""What would make long work shorter, told with the estimate of how long it takes."""

from __future__ import annotations

import os

from ..models.base import Model
from ..recipe import Recipe
from ..recipe.quick import QUICK, quick_side
from ..runtime.progress import Progress, advise


def advise_on_synthesis(
    progress: Progress, recipe: Recipe, model: Model, workers: int | None
) -> None:
    """Say it of a synthesis.

    Args:
        progress: whom to tell.
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
    on_cpu = model.device.type == "cpu"
    if on_cpu and workers is not None and workers < (os.cpu_count() or 1):
        ways.append("more workers")
    _say(progress, "synthesis", ways, on_cpu)


def advise_on_quantization(progress: Progress, recipe: Recipe, model: Model, count: int) -> None:
    """Say it of the steps of a quantization.

    Args:
        progress: whom to tell.
        recipe: the experiment.
        model: the float network, on its device.
        count: images of the set.
    """
    on_cpu = model.device.type == "cpu"
    section, epochs = recipe.quantization, recipe.distillation.epochs
    trains = recipe.method != "ptq"
    follows = f"training for {epochs} epochs follows" if trains else ""
    images = []
    if min(section.rounding_images, count) > QUICK["quantization.rounding_images"]:
        images = ["fewer images to round on (--quick, or quantization.rounding_images)"]
    _say(progress, "rounding", images, on_cpu, follows)
    steps = []
    if section.reconstruction_iterations > QUICK["quantization.reconstruction_iterations"]:
        steps = ["fewer quantization.reconstruction_iterations"]
    _say(progress, "reconstruction", [*images, *steps, "gptq instead"], on_cpu, follows)
    ways = ["a smaller set", "fewer distillation.epochs", "dfq ptq, which does not train"]
    _say(progress, "training", ways, on_cpu)


def _say(progress: Progress, task: str, ways: list[str], on_cpu: bool, follows: str = "") -> None:
    ways = [*ways, *(["a GPU"] if on_cpu else [])]
    *first, last = ways or [""]
    shorter = f"shorter with {', '.join(first)}{' or ' if first else ''}{last}" if last else ""
    advise(progress, task, "; ".join(filter(None, (follows, shorter))))

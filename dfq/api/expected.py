"""How long a quantization or a deployment will take in all, told at its start."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from ..data.calibration_set import CalibrationSet
from ..data.pixels import LabelledImages
from ..export.latency import ROUNDS, SECONDS_A_TURN
from ..export.targets import Target
from ..graph.fold_batchnorm import fold
from ..graph.outline import outline_of_any_size
from ..models.base import Model
from ..ptq.pipeline import float_start
from ..ptq.rates import Stopwatch
from ..recipe import Recipe
from ..runs.held_out import count_held_out
from ..runs.inputs import joining
from ..runs.phases import Noise, quantization_phases
from ..runs.set_cache import cached_folder, is_complete
from ..runtime.forecast import Phase
from ..runtime.progress import Progress, Silent, forecast
from .job import Job
from .plan import Plan
from .shorter import shorter, ways_of_quantization, ways_of_synthesis
from .verify import PARITY_IMAGES
from .verifying import DIAGNOSIS_IMAGES

FLOAT_EXPORT, QUANTIZED_EXPORT = 0.08, 0.2
"""Seconds of an export for each layer of a network: Python's work, which is not timed beforehand,
as a small one would take as long. Of YOLOv5n, ONNX, one core."""

COMPARED, CHECKED = 4.0, 8.0
"""Passes of the float network on the CPU that an image takes in the quantized one or in a file with
its decoding; and where a file's integers are compared with PyTorch's."""


def foretell(job: Job, plan: Plan, images: LabelledImages | None) -> None:
    """Have the phases of a quantization told as one work from now on.

    Args:
        job: that it is.
        plan: what is to be done.
        images: the set that it is done with; None: one that is to be made first, unless the cache
            has it: then there is nothing to tell yet.
    """
    recipe, makes = plan.recipe, images is None
    if not job.is_main_process:
        return
    if makes and is_complete(cached_folder(plan.detector, recipe.synthesis, recipe.seed)):
        return
    count = recipe.synthesis.images if images is None else len(images)
    ways = ways_of_synthesis(recipe, plan.detector) if makes else []
    ways += ways_of_quantization(recipe, count)

    def phases() -> list[Phase]:
        side = recipe.synthesis.image_size or plan.detector.image_size
        if images is not None:
            side = images.load([0]).shape[-1]
        held_out = count_held_out(count) if makes or isinstance(images, CalibrationSet) else 0
        # Some of the photos join the calibration, and the others are compared on.
        photos = len(plan.photos or ())
        joined = len(joining(photos))
        made = quantization_phases(
            plan.teacher,
            recipe,
            side,
            trained=count - held_out,
            calibrated=count - held_out + joined,
            held_out=held_out,
            processes=job.world.size,
            measured_on=plan.measured_on,
            selected_on=plan.selected_on,
            photos=photos - joined,
        )
        # Its own first iterations tell.
        return [("synthesis", None), *made] if makes else made

    told = forecast(job.progress, "quantize", phases, shorter(ways, plan.detector))
    job.stack.enter_context(told)


def foretold_deployment(
    progress: Progress,
    target: Target,
    detector: Model,
    recipe: Recipe,
    side: int,
    *,
    named: bool,
    count: int,
    photos: int,
) -> AbstractContextManager[None]:
    """A context in which the phases of a deployment are told as one work.

    Args:
        progress: whom to tell.
        target: what to deploy to.
        detector: the float network.
        recipe: of the quantization.
        side: of the images, pixels.
        named: whether the user named the set; else it is in the cache, or to be made.
        count: images of the set.
        photos: real images besides.
    """
    cached = cached_folder(detector, recipe.synthesis, recipe.seed)
    makes = not named and not is_complete(cached)
    ways = ways_of_synthesis(recipe, detector) if makes else []
    ways += ways_of_quantization(recipe, count)

    def phases() -> list[Phase]:
        held_out, joined = count_held_out(count), len(joining(photos))
        teacher = float_start(detector.clone(), recipe.quantization, Silent())
        made = quantization_phases(
            teacher,
            recipe,
            side,
            trained=count - held_out,
            calibrated=count - held_out + joined,
            held_out=held_out,
            photos=photos - joined,
        )
        after = _phases_of_files(target, detector, side, count, named)
        return [*([("synthesis", None)] if makes else []), *made, *after]

    return forecast(progress, "deploy", phases, shorter(ways, detector))


def _phases_of_files(
    target: Target, detector: Model, side: int, count: int, named: bool
) -> list[Phase]:
    """Writing the files for a target and checking them, on the CPU; arguments are those of
    `foretold_deployment`."""
    layers, noise = len(outline_of_any_size(detector).layers), Noise(side)
    floats = ("export", [layers * FLOAT_EXPORT / 2] * 2)
    if target.calibration:
        return [floats]
    network, images = fold(detector.clone().to("cpu")), noise.load(list(range(len(noise))))
    watch = Stopwatch(torch.device("cpu"))
    with torch.no_grad():
        batch = images.float() / 255
        network.raw(batch)
        image = watch(lambda: network.raw(batch)) / len(images)
    compared: Phase = (detector.task, [image * COMPARED] * min(DIAGNOSIS_IMAGES, count))
    phases: list[Phase] = [
        floats,
        ("export", [layers * QUANTIZED_EXPORT / 2] * 2),
        ("parity", [image * CHECKED * PARITY_IMAGES]),
        # The file, the run or the float network, and on named images both.
        *([compared] * (3 if named else 2)),
    ]
    if target.latency:
        files = 3 if target.format == "openvino" else 2
        # With one thread and with all.
        phases.append(("latency", [2 * ROUNDS * files * SECONDS_A_TURN]))
    return phases

"""The end of a `dfq qat`: what was kept and how close it is, measured, said and saved."""

from __future__ import annotations

from typing import Any

import torch

from ..data.calibration_set import CalibrationSet
from ..evaluation.agreement import Agreement
from ..evaluation.measuring import (
    RealSet,
    close_on_images,
    close_on_pixels,
    closeness_sentence,
    main_figure,
)
from ..mixed_precision.policy import read_bits
from ..quantization.inspection import bit_operations, list_layers, quantized_share
from ..quantization.policy import Policy
from ..runs.folder import Run
from ..runs.held_out import Looked
from ..runs.outcome import candidates_sentence, divergence_sentence, kept_sentence
from ..runs.pipeline import QuantizationResult, measure
from ..runtime.files import user_path
from ..runtime.progress import Progress
from ..runtime.surroundings import versions
from ..synthesis.quality import quality_of
from .plan import Plan


def finish(
    run: Run,
    plan: Plan,
    policy: Policy,
    result: QuantizationResult,
    images: int,
    looked: Looked,
    photos: RealSet | None,
    progress: Progress,
) -> None:
    """Measure and save the result of a run.

    Args:
        run: where to.
        plan: what was to be done.
        policy: each layer's bits.
        result: the quantized network, and how it was trained.
        images: of the set it was made on.
        looked: synthetic images to compare with the teacher on.
        photos: real images without labels to compare with the teacher on; None: none.
        progress: told how far it is.
    """
    settings, teacher = plan.recipe, plan.teacher
    student, outcome, selected = result.student, result.outcome, result.selected
    # As they will be loaded: another memory layout sums in another order.
    for detector in (teacher, student):
        detector.module.to(memory_format=torch.contiguous_format)
    layers = list_layers(student)
    metrics: dict[str, Any] = {
        "method": settings.method,
        "selected": selected,
        "weight_bits": settings.quantization.weight_bits,
        "activation_bits": settings.quantization.activation_bits,
        "quantized_share_of_macs": quantized_share(layers),
        "bit_operations": bit_operations(layers),
        "images": images,
    }
    if settings.quantization.mixed.budget is not None:
        allocation = read_bits(run.folder / "sensitivity.json")
        metrics["mixed"] = {
            key: allocation[key] for key in ("cost", "budget", "spent", "divergence")
        }
    if outcome is not None:
        metrics["teacher_divergence"] = outcome.divergence
        metrics["history"] = outcome.history
        if outcome.best is not None and selected.startswith("qat"):
            epoch, score = outcome.best
            where = settings.distillation.select_on
            figure = main_figure(student.task)
            metrics["selected_on_real_images"] = {"data": where, "epoch": epoch, figure: score}
    said = [kept_sentence(selected, outcome)]
    if result.candidates:
        metrics["candidates"] = result.candidates
        said.append(candidates_sentence(result.candidates, looked.where))
    if outcome is not None:
        said.append(divergence_sentence(outcome))
    pixels = looked.data.load(looked.indices)
    close = close_on_pixels(student, teacher, pixels)
    said.append(closeness_sentence(close, looked.where))
    metrics["closeness"] = {"synthetic": {**close.to_dict(), "held_out": looked.held_out}}
    if photos is not None:
        on_photos = close_on_images(
            student,
            teacher,
            photos,
            progress=progress,
            image_size=settings.evaluation.image_size,
        )
        metrics["closeness"]["photos"] = {"data": str(photos.source), **on_photos.to_dict()}
        text = closeness_sentence(on_photos, f"the {len(photos)} photos it was made without")
        if isinstance(on_photos, Agreement) and on_photos.objects:
            text += f"; agreement AP {on_photos.AP:.3f}, AP50 {on_photos.AP50:.3f}"
        said.append(text)
    if isinstance(looked.data, CalibrationSet):
        quality = quality_of(looked.data.manifest)
        if quality is not None:
            metrics["set_quality"] = quality.to_dict()
            said += [quality.summary(), *(f"warning: {line}" for line in quality.warnings())]
    metrics["said"] = said
    if plan.measured_on is not None:
        metrics["evaluation"] = measure(teacher, student, plan.measured_on, settings, progress)
    # Not above: what draws is slow to import, and looks at runs.
    from .report import drawing_of

    draw = drawing_of(run, metrics, student, layers, teacher, looked.data, photos, progress)
    extra: dict[str, Any] = {"versions": versions()}
    if plan.source is not None:
        # For what is to be found on the same images later.
        extra["data_path"] = str(user_path(plan.source).absolute())
    run.finish(student, policy, metrics, extra, draw)
    for line in said:
        run.log(line)
    run.log(f"finished: {selected}")

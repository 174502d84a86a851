"""The end of a `dfq qat`: what was kept and how close it is, measured, said and saved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data.calibration_set import CalibrationSet
from ..data.image_set import ImageSet
from ..evaluation.agreement import Kept, agreement, on_squares, sentence
from ..models.base import Detector
from ..qat.trainer import LabelledImages, Outcome
from ..quantization.convert import Policy
from ..quantization.inspection import bit_operations, describe, quantized_share
from ..recipe import Recipe
from ..runs.folder import Run
from ..runtime.progress import Progress
from ..runtime.surroundings import versions
from ..synthesis.quality import quality_of
from ..training import FAR, measure, read_bits

MOST_HELD_OUT = 16
"""So many images of a calibration set are held out at most, and no more than an eighth of it: some
hundred objects, and what is made of the others hardly misses them."""


@dataclass(frozen=True)
class Looked:
    """Synthetic images to look at when all is done.

    Attributes:
        data: where they are.
        indices: which.
        held_out: whether the low-bit network was made without them.
    """

    data: LabelledImages
    indices: list[int]
    held_out: bool

    @property
    def where(self) -> str:
        synthetic = isinstance(self.data, CalibrationSet)
        if self.held_out:
            return f"{len(self.indices)} held-out synthetic images"
        return (
            f"{len(self.indices)} of the {'synthetic ' if synthetic else ''}images it was made on"
        )


def hold_out(data: LabelledImages) -> tuple[LabelledImages, Looked]:
    """What of a set to calibrate and train on, and what to look at in the end.

    The last images of a calibration set are held out; of a set of fewer than 8 images, and of a
    real one, which may be all that its owner has, none are.
    """
    n = len(data)
    count = min(MOST_HELD_OUT, n // 8) if isinstance(data, CalibrationSet) else 0
    if not count or not isinstance(data, CalibrationSet):
        return data, Looked(data, list(range(min(MOST_HELD_OUT, n))), held_out=False)
    rest = replace(
        data,
        files=data.files[:-count],
        labels=data.labels[:-count],
        scores=data.scores[:-count],
    )
    return rest, Looked(data, list(range(n - count, n)), held_out=True)


def finish(
    run: Run,
    teacher: Detector,
    policy: Policy,
    trained: tuple[Detector, Outcome | None, str],
    settings: Recipe,
    images: int,
    looked: Looked,
    measured_on: ImageSet | None,
    photos: ImageSet | None,
    progress: Progress,
) -> None:
    """Measure and save what training gave.

    Args:
        run: where to.
        teacher: the folded float detector.
        policy: each layer's bits.
        trained: what `train` returned.
        settings: the recipe.
        images: of the set it was made on.
        looked: synthetic images to compare with the teacher on.
        measured_on: a labelled set; None: none.
        photos: real images without labels to compare with the teacher on; None: none.
        progress: told how far it is.
    """
    student, outcome, selected = trained
    # As they will be loaded: another memory layout sums in another order.
    for detector in (teacher, student):
        detector.module.to(memory_format=torch.contiguous_format)
    layers = describe(student)
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
        found = read_bits(run.folder / "sensitivity.json")
        metrics["mixed"] = {key: found[key] for key in ("cost", "budget", "spent", "divergence")}
    if outcome is not None:
        metrics["teacher_divergence"] = outcome.agreement
        metrics["history"] = outcome.history
        if outcome.best is not None and selected.startswith("qat"):
            epoch, score = outcome.best
            where = settings.distillation.select_on
            metrics["selected_on_real_images"] = {"data": where, "epoch": epoch, "AP": score}
    said = [kept_sentence(selected, outcome)]
    if outcome is not None:
        said.append(divergence_sentence(outcome))
    batch_size = settings.evaluation.batch_size
    pixels = looked.data.load(looked.indices)
    close: dict[str, Kept] = {"synthetic": on_squares(student, teacher, pixels, batch_size)}
    said.append(sentence(close["synthetic"], looked.where))
    metrics["closeness"] = {
        "synthetic": {**close["synthetic"].to_dict(), "held_out": looked.held_out}
    }
    if photos is not None:
        on_photos = agreement(
            student,
            teacher,
            photos,
            progress=progress,
            image_size=settings.evaluation.image_size,
            batch_size=batch_size,
        )
        metrics["closeness"]["photos"] = {"data": str(photos.source), **on_photos.to_dict()}
        text = sentence(on_photos, f"the {len(photos)} photos it was made without")
        if on_photos.objects:
            text += f"; agreement AP {on_photos.AP:.3f}, AP50 {on_photos.AP50:.3f}"
        said.append(text)
    if isinstance(looked.data, CalibrationSet):
        quality = quality_of(looked.data.manifest)
        if quality is not None:
            metrics["set_quality"] = quality.to_dict()
            said += [quality.summary(), *(f"warning: {line}" for line in quality.warnings())]
    metrics["said"] = said
    if measured_on is not None:
        metrics["evaluation"] = measure(teacher, student, measured_on, settings, progress)
    # Not above: what draws is slow to import, and looks at runs.
    from .report import drawing_of

    draw = drawing_of(run, metrics, student, layers, teacher, looked.data, photos, progress)
    run.finish(student, policy, metrics, {"versions": versions()}, draw)
    for line in said:
        run.log(line)
    run.log(f"finished: {selected}")


def kept_sentence(selected: str, outcome: Outcome | None) -> str:
    """Which network was kept, and why that is fine, for people.

    Args:
        selected: why it is this one, as `train` says it.
        outcome: how training ended; None where there was none, or it diverged.
    """
    kind, _, reason = selected.partition(": ")
    start = "kept: the network as it was calibrated and rounded on the images, before training"
    if kind != "ptq":
        return f"kept: the trained network ({selected})"
    if not reason:
        return "kept: the network as it was calibrated and rounded; no training was asked for"
    if outcome is None:
        return (
            f"{start}, because training diverged. It is complete and can be used; a lower "
            "distillation.lr may make training worth its while"
        )
    begun, ended = outcome.agreement["start"], outcome.agreement[outcome.selected]
    far = "no closer to it than it began"
    if ended > 1.05 * begun > 0:
        far = f"{ended / begun:.3g} times as far from it as it began"
    advice = "; ".join(part for part in reason.split("; ") if part.startswith("--set"))
    rule = "training is kept only where it brings the network closer to the float one"
    if outcome.best is not None:
        rule = f"no training is kept that ends more than {FAR:g} times as far from the float one"
    return (
        f"{start}. This is a complete result and no failure: {rule}, and here it ended {far}"
        f"{f' ({advice})' if advice else ''}"
    )


def divergence_sentence(outcome: Outcome) -> str:
    """What `teacher_divergence` holds, and what it means."""
    start, end = outcome.agreement["start"], outcome.agreement[outcome.selected]
    return (
        f"teacher_divergence: {start:.4g} before training, {end:.4g} after it: how far the low-bit "
        "network's predictions are from the float one's on the images it was made on, per image; "
        "0 is equal, and only values of one network and set compare"
    )

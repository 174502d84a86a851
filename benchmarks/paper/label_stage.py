"""The label stage, looked at while it runs, and taken for the whole synthesis."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dfq.data.calibration_set import CalibrationSet
from dfq.data.calibration_writer import CalibrationWriter
from dfq.models import load_detector
from dfq.recipe import Recipe
from dfq.synthesis.adaptive_labels import AdaptiveSampler
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.labels import teacher_scores
from dfq.synthesis.settings import Synthesis
from dfq.synthesis.shards import Plan
from dfq.synthesis.side_by_side import generator_for


@dataclass(frozen=True)
class Moment:
    """Images and labels after some iterations.

    Attributes:
        iterations: how many are done.
        images: uint8 `(n, 3, s, s)`.
        labels: per image `(n_i, 5)`: category, cx, cy, w, h in [0, 1].
    """

    iterations: int
    images: Tensor
    labels: list[Tensor]


def watch(
    inversion: Inversion,
    settings: Synthesis,
    count: int,
    seed: int,
    shard: int = 0,
    moments: Collection[int] = (),
) -> list[Moment]:
    """Run the label stage of a shard, with the draws that the synthesis makes for it.

    Args:
        inversion: of the detector, with these settings.
        settings: with adaptive labels.
        count: images of the shard.
        seed: of the set.
        shard: its number.
        moments: after how many iterations to look; after the last one in any case.

    Returns:
        Those moments, in order.
    """
    generator = generator_for(seed, shard, "labels")
    stage = settings.label_stage
    labels = inversion.start_labels(generator, count, inversion.detector.num_classes)
    noise = inversion.start.noise(count, stage.image_size, generator)
    sampler = AdaptiveSampler(inversion.detect, stage, labels, generator)
    wanted = {*moments, stage.iterations}
    seen: list[Moment] = []

    def look(iterations: int, images: Tensor) -> None:
        if iterations in wanted:
            pixels = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
            seen.append(Moment(iterations, pixels, [rows.clone() for rows in sampler.labels]))

    def after(step: int, images: Tensor) -> list[Tensor] | None:
        changed = sampler(step, images)
        if step + 1 < stage.iterations:
            look(step + 1, images)
        return changed

    look(0, noise)
    images = inversion.optimise(
        noise.clone(),
        labels,
        stage.iterations,
        settings.learning_rate,
        generator_for(seed, shard, "augment"),
        stage="labels",
        after=after,
    )
    # What it returns is what is stored: pixels are clamped after the last call of `after`.
    look(stage.iterations, images)
    return seen


def one_stage_set(model: str, recipe: Recipe, folder: Path) -> CalibrationSet:
    """A set whose images are those of the label stage, at full size: labels and images at once.

    Args:
        model: the float detector.
        recipe: whose image stage gives size and iterations.
        folder: of the set; goes on where it was.
    """
    settings = recipe.synthesis
    size = settings.image_size
    assert size is not None
    stage = settings.label_stage.model_copy(
        update={"image_size": size, "iterations": settings.iterations}
    )
    settings = settings.model_copy(update={"label_stage": stage})
    detector = load_detector(model)
    inversion = Inversion(detector, settings)
    plan = Plan(recipe.seed, settings.images, settings.batch_size)
    determinants = {
        "checkpoint": detector.fingerprint,
        "one_stage": settings.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    writer = CalibrationWriter(folder, determinants, detector.names, plan.shards)
    for shard in writer.missing():
        last = watch(inversion, settings, plan.count(shard), recipe.seed, shard)[-1]
        detections = inversion.detect(
            last.images.to(detector.device).float() / 255, score_threshold=0.01, iou_threshold=0.6
        )
        scores = teacher_scores(last.labels, detections, size)
        writer.append(shard, plan.first(shard), last.images, last.labels, scores)
    return writer.finish({"model": detector.source})

"""From a detector and settings to a calibration set on disk, shard by shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..dataset.calibration import CalibrationSet, CalibrationWriter
from ..detectors.base import Detector
from ..errors import UserError
from ..recipe import Synthesis
from .inversion import Inversion, Report
from .labels import label_source_identity

# Raised when a change of the code changes the images: older sets are then not mistaken for new.
ALGORITHM = 1


def determinants(detector: Detector, settings: Synthesis, seed: int) -> dict[str, Any]:
    """All that decides what is in a set, JSON-able; equal determinants mean an equal set."""
    values = settings.model_dump(mode="json")
    values["image_size"] = settings.image_size or detector.image_size
    identity = label_source_identity(settings)
    if identity is not None:
        # What the labels are counts, not where they lie.
        values["labels"] = f"real:{identity}"
    return {
        "algorithm": ALGORITHM,
        "checkpoint": detector.fingerprint,
        "family": detector.family,
        "seed": seed,
        "synthesis": values,
    }


def set_name(detector: Detector, settings: Synthesis, seed: int) -> str:
    """A folder name made from what determines the set."""
    wanted = determinants(detector, settings, seed)
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    stem = Path(detector.source).stem or detector.family
    size = wanted["synthesis"]["image_size"]
    return f"{stem}-{settings.images}x{size}-{digest[:12]}"


def check(detector: Detector, settings: Synthesis) -> None:
    """Refuse what cannot work before any work starts.

    Raises:
        UserError: for an image size that is no multiple of the stride, or a loss without terms.
    """
    check_size("synthesis.image_size", settings.image_size or detector.image_size, detector)
    adaptive = settings.labels == "adaptive"
    if adaptive:
        check_size("synthesis.label_stage.image_size", settings.label_stage.image_size, detector)
    weights = settings.weights
    labelled = weights.task > 0 and settings.labels != "none"
    optimises = settings.iterations > 0 or adaptive
    if optimises and not (weights.bn > 0 or weights.first_bn > 0 or weights.tv > 0 or labelled):
        raise UserError(
            "synthesis.weights: every term that applies has weight 0, so there is nothing to "
            "optimise; set one above 0, or synthesis.iterations=0 with labels that are not adaptive"
        )


def check_size(key: str, size: int, detector: Detector) -> None:
    """Raise a `UserError` where the side set under `key` is no multiple of the model's stride."""
    stride = detector.stride
    if size % stride:
        lower, upper = size // stride * stride, (size // stride + 1) * stride
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise UserError(f"{key}: {size} is no multiple of the model's stride {stride}; try {near}")


def synthesize_set(
    detector: Detector,
    settings: Synthesis,
    seed: int,
    out: Path,
    *,
    report: Report | None = None,
    shard_done: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Make the calibration set of `detector` in folder `out`, or finish one that was interrupted.

    The result does not depend on how often it was interrupted: every shard draws from generators
    seeded by (seed, shard) alone.

    Args:
        detector: frozen, unfused.
        settings: the `synthesis` section of a recipe.
        seed: fixes the set.
        out: the folder; a complete set of the same determinants is returned as it is.
        report: progress within a shard.
        shard_done: called with (images done, images in all), also once at the start.

    Raises:
        UserError: for settings that cannot work, or a folder that holds something else.
    """
    check(detector, settings)
    inversion = Inversion(detector, settings)
    total = settings.images
    firsts = list(range(0, total, settings.batch_size))
    wanted = determinants(detector, settings, seed)
    writer = CalibrationWriter(out, wanted, detector.names, len(firsts))
    if writer.complete:
        return CalibrationSet.open(out)
    with writer.lock():
        missing = writer.missing()
        done = total - sum(min(settings.batch_size, total - firsts[i]) for i in missing)
        if shard_done is not None:
            shard_done(done, total)
        for index in missing:
            count = min(settings.batch_size, total - firsts[index])
            batch = inversion.batch(count, seed, index, report)
            writer.append(index, firsts[index], batch.images, batch.labels, batch.scores)
            done += count
            if shard_done is not None:
                shard_done(done, total)
        versions = {"dfq": __version__, "torch": torch.__version__}
        return writer.finish({"model": detector.source, "versions": versions})

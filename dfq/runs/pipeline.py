"""From a policy to the low-bit network: PTQ, QAT, and the better of both; measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..data.calibration_set import CalibrationSet
from ..data.image_set import ImageSet
from ..data.pixels import LabelledImages, Pixels
from ..errors import DivergedError
from ..evaluation.coco import evaluate as evaluate_detector
from ..models.base import Detector
from ..ptq.pipeline import quantized
from ..qat.trainer import Outcome, Trainer
from ..quantization.policy import Policy
from ..recipe import Recipe
from ..runtime.distributed import World
from ..runtime.progress import Progress

FAR = 10.0
"""A network so many times further from its teacher than it began has lost what it could."""


def train(
    teacher: Detector,
    policy: Policy,
    recipe: Recipe,
    data: LabelledImages,
    folder: Path,
    log: Callable[[str], None],
    progress: Progress,
    world: World,
    real: ImageSet | None = None,
    calibration: Pixels | None = None,
) -> tuple[Detector, Outcome | None, str]:
    """Make the low-bit detector as `recipe.method` says.

    Args:
        teacher: the folded float detector.
        policy: each layer's bits.
        recipe: the experiment.
        data: what to calibrate and train on.
        folder: of the run; checkpoints are written there, and gone on from.
        log: takes lines for the run's log.
        progress: told how far it is.
        world: the processes that share the training; each calls this, and gets the same.
        real: a labelled set to select the epoch on; None: weights are selected without real images.
        calibration: what to calibrate and round on; None: `data`.

    Returns:
        The student, how training ended (None where there was none), and why it is this student.

    Raises:
        DivergedError: where training diverged, unless the method is `auto`.
        UserError: where a checkpoint cannot be read, or another process died.
    """
    seen = calibration or data
    if recipe.method == "ptq":
        return quantized(teacher, policy, recipe.quantization, seen, progress), None, "ptq"
    resuming = world.share((folder / "checkpoint.pt").is_file())
    # A resumed student gets its scales from the checkpoint: calibrating would be for nothing.
    student = quantized(teacher, policy, recipe.quantization, None if resuming else seen, progress)
    log("training resumed" if resuming else "training started")
    # Kept to fall back to; a resumed run that has to finds it anew, which takes the time again.
    kept = recipe.method == "qat" and recipe.distillation.keep_worse
    start = None if resuming or kept else student.twin()

    def beginning() -> Detector:
        # The trainer has laid it out anew, and sums in another order differ in their last bits.
        teacher.module.to(memory_format=torch.contiguous_format)
        return start or quantized(teacher, policy, recipe.quantization, seen, progress)

    judge = None
    if real is not None:
        log(f"weights are selected by AP on {recipe.distillation.select_on}: not data-free")
        judge = judge_on(real, recipe)
    trainer = Trainer(
        student,
        teacher,
        data,
        recipe.distillation,
        seed=recipe.seed,
        folder=folder,
        world=world,
        judge=judge,
    )
    try:
        with progress.task("training", recipe.distillation.epochs, "epochs") as task:

            def report(done: int, total: int, terms: dict[str, float]) -> None:
                shown = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
                log(f"epoch {done}/{total}  {shown}")
                task.detail("qat", done, total, terms)
                task.update(done, total)

            def within(epoch: int, share: float) -> None:
                if share == 0:
                    task.update(epoch, recipe.distillation.epochs)
                task.within(share)

            outcome = trainer.train(report, within)
    except DivergedError as error:
        log(str(error))
        if recipe.method != "auto":
            # All of them see it; one tells.
            with world.leader_first():
                raise
        return beginning(), None, "ptq: training diverged"
    worse = worse_than_start(outcome)
    if worse and not kept:
        reason = f"ptq: {worse}"
        if recipe.method == "qat":
            reason += "; --set distillation.keep_worse=true keeps what was trained"
        return beginning(), outcome, reason
    reason = f"qat: {outcome.selected} weights"
    if outcome.best is not None:
        where = recipe.distillation.select_on
        reason = f"qat: epoch {outcome.best[0]}, the best by AP on the real images of {where}"
    return student, outcome, f"{reason}; but {worse}" if worse else reason


def worse_than_start(outcome: Outcome) -> str:
    """Why the calibrated start is better than what training made of it; empty where it is not."""
    start, end = outcome.agreement["start"], outcome.agreement[outcome.selected]
    # Where real images chose the epoch, closeness to the teacher has a say at the extreme only.
    if end <= start * (FAR if outcome.best is not None else 1):
        return ""
    times = f" ({end / start:.3g} times as far)" if end > 1.05 * start > 0 else ""
    return f"training ended further from the teacher than it began{times}"


def judge_on(images: ImageSet, recipe: Recipe) -> Callable[[Detector], float]:
    """COCO AP on a labelled real set, as the paper selects its epoch by; 0 where it is undefined.

    Args:
        images: the set.
        recipe: whose `evaluation` section gives image and batch size.
    """

    def judge(student: Detector) -> float:
        found = evaluate_detector(
            student,
            images,
            image_size=recipe.evaluation.image_size,
            batch_size=recipe.evaluation.batch_size,
        ).AP
        return found if math.isfinite(found) else 0.0

    return judge


def data_identity(calibration: LabelledImages, source: str | Path | None) -> list[Any]:
    """JSON-able values that tell one training set from another."""
    # Lists, not tuples: it is compared with what JSON gives back.
    if isinstance(calibration, CalibrationSet):
        shards = [shard["sha256"] for shard in calibration.manifest["shards"]]
        return [calibration.manifest["annotations_sha256"], shards]
    return [str(source), len(calibration)]


def measure(
    teacher: Detector, student: Detector, data: ImageSet, recipe: Recipe, progress: Progress
) -> dict[str, Any]:
    """AP of float and quantized network; never looked at by the training."""
    result: dict[str, Any] = {"data": recipe.evaluation.data}
    for name, detector in (("float", teacher), ("quantized", student)):
        with progress.task(f"evaluation ({name})", len(data), "images") as task:
            found = evaluate_detector(
                detector,
                data,
                image_size=recipe.evaluation.image_size,
                batch_size=recipe.evaluation.batch_size,
                progress=task.update,
            ).to_dict()
        # Times would make two runs of one seed differ.
        result[name] = {k: v for k, v in found.items() if not k.endswith(("seconds", "second"))}
    return result

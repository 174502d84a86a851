"""From a policy to the low-bit network: PTQ, QAT, and the better of both; measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.calibration_set import CalibrationSet
from ..data.pixels import LabelledImages, Pixels
from ..errors import DivergedError
from ..evaluation.measuring import RealSet, main_figure, measured, metric_name
from ..models.base import Model
from ..models.divergence import divergence_per_image
from ..ptq.block_io import ROOM
from ..ptq.pipeline import (
    quantized,
    reconstructs_blocks,
    starts_from_gptq,
    with_reconstructed_blocks,
)
from ..qat.trainer import Outcome, Trainer
from ..quantization.policy import Policy
from ..recipe import Recipe
from ..runtime.distributed import World
from ..runtime.progress import Progress
from .folder import RECONSTRUCTION
from .shared import SharedRun

FAR = 10.0
"""A network so many times further from its teacher than it began has lost what it could."""


@dataclass(frozen=True)
class QuantizationResult:
    """A low-bit network, and how it came about.

    Attributes:
        student: the network.
        outcome: how training ended; None where there was none, or it diverged.
        selected: why it is this network: "ptq", "ptq: REASON" or "qat: WEIGHTS".
        candidates: divergence from the teacher on the held-out images, an image, of what was
            compared: by method, the reconstruction's or "qat"; empty where nothing was.
    """

    student: Model
    outcome: Outcome | None
    selected: str
    candidates: dict[str, float] = field(default_factory=dict)


def ptq_then_qat(
    teacher: Model,
    policy: Policy,
    recipe: Recipe,
    images: LabelledImages,
    run: SharedRun,
    progress: Progress,
    world: World,
    *,
    calibration: Pixels | None = None,
    select_on: RealSet | None = None,
    held_out: Tensor | None = None,
    room: int = ROOM,
) -> QuantizationResult:
    """Make the low-bit detector as `recipe.method` says: calibrate and round, then train, and go
    back to the start where training made it worse.

    Args:
        teacher: the folded float detector.
        policy: each layer's bits.
        recipe: the experiment.
        images: what to train on.
        run: checkpoints are written in its folder, and gone on from.
        progress: told how far it is.
        world: the processes that share the training; each calls this, and gets the same.
        calibration: what to calibrate and round on; None: `images`.
        select_on: a labelled real set to select the epoch on; None: weights are selected without
            real images.
        held_out: uint8 images `(n, 3, h, w)` that nothing else looks at. Where blocks are
            reconstructed and the method is `auto`, the network that is closest to the teacher on
            them is kept: rounded by GPTQ, reconstructed or trained. None: there are none.
        room: bytes of a block's inputs and outputs that reconstruction keeps on the host.

    Raises:
        DivergedError: where training diverged, unless the method is `auto`.
        UserError: where a checkpoint cannot be read, or another process died.
    """
    section = recipe.quantization
    calibration_images = calibration or images
    blocks = reconstructs_blocks(section)
    compared = held_out if blocks and recipe.method == "auto" else None
    candidates: dict[str, float] = {}

    def ptq() -> Model:
        # The processes of a job would write one file.
        checkpoint = run.folder / RECONSTRUCTION if world.size == 1 else None
        # What has blocks that are done needs nothing of what came before them.
        goes_on = checkpoint is not None and checkpoint.is_file() and compared is None
        begun = quantized(
            teacher, policy, section, None if goes_on else calibration_images, progress
        )
        if not blocks:
            return begun
        rounded = None
        if compared is not None:
            rounded = begun.clone()
            if not starts_from_gptq(section):
                plain = section.model_copy(update={"reconstruction": "gptq"})
                rounded = quantized(teacher, policy, plain, calibration_images, progress)
        made = with_reconstructed_blocks(
            begun,
            teacher,
            section,
            calibration_images,
            progress,
            seed=recipe.seed,
            checkpoint=checkpoint,
            room=room,
        )
        if rounded is None or compared is None:
            return made
        candidates["gptq"] = divergence_per_image(rounded, teacher, compared)
        candidates[section.reconstruction] = divergence_per_image(made, teacher, compared)
        return made if candidates[section.reconstruction] < candidates["gptq"] else rounded

    if recipe.method == "ptq":
        return QuantizationResult(ptq(), None, "ptq")
    resuming = world.broadcast((run.folder / "checkpoint.pt").is_file())
    # A resumed student gets its scales from the checkpoint: calibrating would be for nothing.
    student = quantized(teacher, policy, section, None, progress) if resuming else ptq()
    run.log("training resumed" if resuming else "training started")
    # Kept to fall back to; a resumed run that has to finds it anew, which takes the time again.
    keeps_worse = recipe.method == "qat" and recipe.distillation.keep_worse
    start = None if resuming or keeps_worse else student.clone()

    def calibrated(outcome: Outcome | None, reason: str) -> QuantizationResult:
        # The trainer has laid it out anew, and sums in another order differ in their last bits.
        teacher.module.to(memory_format=torch.contiguous_format)
        return QuantizationResult(start or ptq(), outcome, f"ptq: {reason}", candidates)

    try:
        outcome = _train(student, teacher, recipe, images, run, progress, world, select_on)
    except DivergedError as error:
        run.log(str(error))
        if recipe.method != "auto":
            # All of them see it; one tells.
            with world.main_process_first():
                raise
        return calibrated(None, "training diverged")
    if compared is not None:
        if start is None:
            teacher.module.to(memory_format=torch.contiguous_format)
            start = ptq()
        closest = min(candidates.values())
        candidates["qat"] = divergence_per_image(student, teacher, compared)
        if candidates["qat"] >= closest:
            return calibrated(outcome, "closest to the teacher on the held-out images")
        selected = f"qat: {outcome.selected} weights"
        return QuantizationResult(student, outcome, selected, candidates)
    worse = worse_than_start(outcome)
    if worse and not keeps_worse:
        advice = "; --set distillation.keep_worse=true keeps what was trained"
        return calibrated(outcome, worse + (advice if recipe.method == "qat" else ""))
    selected = f"qat: {outcome.selected} weights"
    if outcome.best is not None:
        where = recipe.distillation.select_on
        selected = (
            f"qat: epoch {outcome.best[0]}, the best by {metric_name(student.task)} on the real "
            f"images of {where}"
        )
    return QuantizationResult(student, outcome, f"{selected}; but {worse}" if worse else selected)


def _train(
    student: Model,
    teacher: Model,
    recipe: Recipe,
    images: LabelledImages,
    run: SharedRun,
    progress: Progress,
    world: World,
    select_on: RealSet | None,
) -> Outcome:
    """Train the student, reporting each epoch; arguments and errors are those of `ptq_then_qat`."""
    settings = recipe.distillation
    evaluator = None
    if select_on is not None:
        run.log(
            f"weights are selected by {metric_name(student.task)} on {settings.select_on}: "
            "not data-free"
        )
        evaluator = evaluator_on(select_on, recipe)
    trainer = Trainer(
        student,
        teacher,
        images,
        settings,
        seed=recipe.seed,
        folder=run.folder,
        world=world,
        masks=recipe.synthesis.masks,
        evaluator=evaluator,
    )
    with progress.task("training", settings.epochs, "epochs") as task:

        def report(done: int, total: int, terms: dict[str, float]) -> None:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
            run.log(f"epoch {done}/{total}  {shown}")
            task.detail("qat", done, total, terms)
            task.update(done, total)

        def within(epoch: int, share: float) -> None:
            if share == 0:
                task.update(epoch, settings.epochs)
            task.within(share)

        return trainer.train(report, within)


def worse_than_start(outcome: Outcome) -> str:
    """Why the calibrated start is better than what training made of it; empty where it is not."""
    start, end = outcome.divergence["start"], outcome.divergence[outcome.selected]
    # Where real images chose the epoch, closeness to the teacher has a say at the extreme only.
    if end <= start * (FAR if outcome.best is not None else 1):
        return ""
    times = f" ({end / start:.3g} times as far)" if end > 1.05 * start > 0 else ""
    return f"training ended further from the teacher than it began{times}"


def evaluator_on(images: RealSet, recipe: Recipe) -> Callable[[Model], float]:
    """COCO AP, or top-1 accuracy, on a labelled real set, as the paper selects its epoch by; 0
    where it is undefined.

    Args:
        images: the set.
        recipe: whose `evaluation` section gives the image size.
    """

    def evaluator(student: Model) -> float:
        figures = measured(student, images, image_size=recipe.evaluation.image_size)
        accuracy: float = getattr(figures, main_figure(student.task))
        return accuracy if math.isfinite(accuracy) else 0.0

    return evaluator


def data_identity(calibration: LabelledImages, source: str | Path | None) -> list[Any]:
    """JSON-able values that tell one training set from another."""
    # Lists, not tuples: it is compared with what JSON gives back.
    if isinstance(calibration, CalibrationSet):
        shards = [shard["sha256"] for shard in calibration.manifest["shards"]]
        return [calibration.manifest["annotations_sha256"], shards]
    return [str(source), len(calibration)]


def measure(
    teacher: Model, student: Model, data: RealSet, recipe: Recipe, progress: Progress
) -> dict[str, Any]:
    """The accuracy of float and quantized network; never looked at by the training."""
    result: dict[str, Any] = {"data": recipe.evaluation.data}
    for name, detector in (("float", teacher), ("quantized", student)):
        with progress.task(f"evaluation ({name})", len(data), "images") as task:
            metrics = measured(
                detector,
                data,
                image_size=recipe.evaluation.image_size,
                progress=task.update,
            ).to_dict()
        # Times would make two runs of one seed differ.
        result[name] = {k: v for k, v in metrics.items() if not k.endswith(("seconds", "second"))}
    return result

"""What `dfq qat` does between its data and its run folder: quantize, train, measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from .data.calibration_set import CalibrationSet
from .data.image_set import ImageSet
from .data.pixels import Pixels
from .errors import DivergedError, UserError
from .evaluation.coco import evaluate as evaluate_detector
from .mixed_precision.search import find_bits
from .models.base import Detector
from .ptq.activation_refinement import narrow_activations, refine_grids
from .ptq.gptq import is_too_wide, reconstruct
from .qat.losses import total_divergence
from .qat.trainer import LabelledImages, Outcome, Trainer
from .quantization.convert import Policy, calibrate, insert_quantizers, quantized_layers
from .quantization.margins import keep_within_statistics
from .quantization.quantizers import Quantizer
from .recipe import Quantization, Recipe
from .runtime.distributed import World
from .runtime.files import read_json, write_json
from .runtime.progress import Progress

FAR = 10.0
"""A network so many times further from its teacher than it began has lost what it could."""


def policy_of(recipe: Recipe) -> Policy:
    """What the `quantization` section of a recipe asks for."""
    section = recipe.quantization
    return Policy(
        weight_bits=section.weight_bits,
        activation_bits=section.activation_bits,
        first_last_bits=section.first_last_bits,
        weights=section.weights,
        weight_grid=section.weight_grid,
        activations=section.activations,
        overrides=tuple(section.overrides.items()),
        scope=section.scope,
        placement=section.placement,
        runtime=section.runtime,
    )


def mixed_policy(
    teacher: Detector,
    recipe: Recipe,
    data: LabelledImages,
    folder: Path,
    log: Callable[[str], None],
    progress: Progress,
    world: World,
) -> Policy:
    """The policy of a recipe, with each layer's bits found where the recipe gives a budget.

    What was found is kept in the run folder as `sensitivity.json`, where a run that goes on finds
    it. Arguments and errors are those of `train`, and of `find_bits`.
    """
    policy = policy_of(recipe)
    if recipe.quantization.mixed.budget is None:
        return policy
    with world.leader_first():
        if world.leads:
            path = folder / "sensitivity.json"
            if not path.is_file():
                found = find_bits(teacher, policy, recipe.quantization, data, progress)
                write_json(path, found.to_dict())
                log(f"bits by layer: {found.spent:.4g} of {found.budget:.4g} {found.kind}")
            overrides = read_bits(path)["overrides"]
            policy = replace(policy, overrides=(*policy.overrides, *overrides.items()))
    shared: Policy = world.share(policy)
    return shared


def read_bits(path: Path) -> dict[str, Any]:
    """What a run's `sensitivity.json` holds.

    Raises:
        UserError: where it is broken.
    """
    found = read_json(path)
    try:
        if not {"cost", "budget", "spent", "divergence"} <= found.keys():
            raise KeyError
        Quantization.model_validate({"overrides": found["overrides"]})
    except (AttributeError, KeyError, ValidationError):
        raise UserError(f"{path}: not as dfq wrote it; delete it to measure again") from None
    return dict(found)


MARGIN_IMAGES = 16
"""Of the calibration, which tell where ranges depend on the contrast."""


def images_to_prepare(section: Quantization) -> int:
    """How many images `calibrate_and_round` looks at."""
    rounding = section.rounding_images if section.rounding == "gptq" else 0
    return max(section.calibration_images, section.refine_images, rounding)


def calibrate_and_round(
    student: Detector,
    teacher: Detector,
    pixels: Tensor,
    section: Quantization,
    progress: Progress,
) -> None:
    """Find the quantizers' initial scales and round the weights as the recipe says.

    Args:
        student: with quantizers inserted; changed in place.
        teacher: the folded float detector, on the same device.
        pixels: uint8 `(n, 3, h, w)`, `images_to_prepare` of them, or all there are.
        section: of the recipe.
        progress: told how far rounding is.
    """
    batches = (batch.float() / 255 for batch in pixels[: section.calibration_images].split(8))
    calibrate(student, batches, search=section.ranges)
    # The other searches are rules of their own, to be compared with.
    if section.ranges == "mse":
        keep_within_statistics(student, pixels[:MARGIN_IMAGES])
    refined = section.refine_images if section.ranges == "mse" else 0
    if refined and narrow_activations(student):
        with progress.task("ranges", 1, "activations") as task:
            refine_grids(student, teacher, pixels[:refined], progress=task.update)
    if section.rounding == "gptq":
        for name, layer in quantized_layers(student.module):
            if is_too_wide(layer):
                progress.note(
                    f"rounding: {name} has too many inputs for gptq: to the nearest level"
                )
        with progress.task("rounding", 1, "layers") as task:
            reconstruct(student, teacher, pixels[: section.rounding_images], progress=task.update)


def clip_strictly(module: nn.Module) -> None:
    """Give quantizers the gradient of LSQ's eq. 3, which goes with its start."""
    for child in module.modules():
        if isinstance(child, Quantizer):
            child.strict = True


def quantized(
    teacher: Detector,
    policy: Policy,
    recipe: Recipe,
    data: Pixels | None,
    progress: Progress,
) -> Detector:
    """A twin of the folded `teacher` with quantizers; unless `data` is None calibrated on it, and
    its weights rounded as the recipe says."""
    student = insert_quantizers(teacher.twin(), policy)
    if recipe.quantization.ranges == "lsq":
        clip_strictly(student.module)
    if data is not None:
        section = recipe.quantization
        pixels = data.load(list(range(min(images_to_prepare(section), len(data)))))
        calibrate_and_round(student, teacher, pixels, section, progress)
    return student


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
        return quantized(teacher, policy, recipe, seen, progress), None, "ptq"
    resuming = world.share((folder / "checkpoint.pt").is_file())
    # A resumed student gets its scales from the checkpoint: calibrating would be for nothing.
    student = quantized(teacher, policy, recipe, None if resuming else seen, progress)
    log("training resumed" if resuming else "training started")
    # Kept to fall back to; a resumed run that has to finds it anew, which takes the time again.
    kept = recipe.method == "qat" and recipe.distillation.keep_worse
    start = None if resuming or kept else student.twin()

    def beginning() -> Detector:
        # The trainer has laid it out anew, and sums in another order differ in their last bits.
        teacher.module.to(memory_format=torch.contiguous_format)
        return start or quantized(teacher, policy, recipe, seen, progress)

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


def mean_divergence(student: Detector, teacher: Detector, data: LabelledImages) -> float:
    """How far the predictions of two networks are apart, per image: the training's own divergence
    (`total_divergence`) over each distribution of the head. On real images it tells low-bit
    networks apart that AP, on a few hundred images, cannot.

    Args:
        student, teacher: on one device, the teacher is the reference.
        data: all of its images count; its labels do not.
    """
    batches = torch.arange(len(data)).split(16)
    total = total_divergence(student, teacher, (data.load(chosen.tolist()) for chosen in batches))
    return float(total) / len(data)


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

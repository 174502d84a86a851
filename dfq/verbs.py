"""The verbs of the package, as functions: what the command line calls, and what you can."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from .cache import cache_folder, cached_folder, origin_for
from .dataset.calibration import CalibrationSet, write_atomic
from .dataset.readers import ImageSet, open_set
from .detectors import load_detector
from .detectors.base import Detector
from .distillation.trainer import LabelledImages, Outcome
from .distributed import World, device_for, gathered
from .errors import UserError
from .evaluation.coco import Metrics
from .evaluation.coco import evaluate as evaluate_detector
from .evaluation.matching import require_labels
from .progress import Progress, Silent
from .quantization.convert import Policy, fold, insert_quantizers, quantized_layers
from .quantization.listing import Inspection, bit_operations, describe, quantized_share
from .quantization.results import count_joins
from .recipe import Recipe, load_recipe
from .run import Run, check_run, identity_of_recipe, is_run, load_run, open_run, versions
from .sensitivity.policy import Sensitivity, find_bits
from .synthesis.produce import synthesize_set
from .tensorboard import Curves
from .training import (
    LetterboxedImages,
    data_identity,
    measure,
    mixed_policy,
    open_training_data,
    policy_of,
    read_bits,
    train,
)


def pick_device(device: str) -> str:
    """Resolve "auto" and check that the device is there.

    Raises:
        UserError: where it is not.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Read back, which "meta" cannot.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {device}: there is no such device here; try --device cpu or auto"
        ) from None
    return device


def load_model(source: str | Path, *, trust: bool = False, device: str = "cpu") -> Detector:
    """A float detector, or the quantized one of a run folder."""
    if is_run(Path(source)):
        return load_run(source, device=device)
    return load_detector(source, trust=trust, device=device)


def _float_model(source: str | Path | None, *, trust: bool, device: str) -> Detector:
    if source is None:
        raise UserError(
            "which model? give --model, or `model:` in the recipe; no calibration set in "
            f"{cache_folder()} tells of one"
        )
    if is_run(Path(source)):
        raise UserError(f"{source}: is a quantized run; give the float detector it was made from")
    return _float(load_detector(source, trust=trust, device=device))


def _float(detector: Detector) -> Detector:
    """The detector, unless it is quantized already."""
    if any(True for _ in quantized_layers(detector.module)):
        raise UserError(
            f"{detector.source}: is quantized already; give the float detector it was made from"
        )
    return detector


def _as_recipe(recipe: Recipe | str | Path | None) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def synthesize(
    model: str | Path | Detector,
    recipe: Recipe | str | Path | None = None,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    trust: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
    tensorboard: str | Path | None = None,
) -> CalibrationSet:
    """Make the calibration set of a detector, or find the one that is already there.

    Started in several processes by torchrun, it shares the work out among them.

    Args:
        model: checkpoint, yaml, published name, "demo", or a loaded detector.
        recipe: whose `synthesis` section and `seed` count; None: the defaults.
        out: folder; None: the cache, under a name made from what determines the set.
        device: "auto", "cpu", "cuda:0", ...
        trust: run what is in the checkpoint.
        progress: told how far it is.
        workers: processes on this machine's CPU cores; None: as many as are worth starting. The set
            is the same whatever it is.
        tensorboard: a folder for the curves of the loss; None: none are written.

    Raises:
        UserError: for anything the user can mend.
    """
    settings = _as_recipe(recipe)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(gathered())
        progress = (progress if world.leads else None) or Silent()
        with world.leader_first():
            target = _own_device(world, device)
            if isinstance(model, Detector):
                detector = _float(model).to(target)
            else:
                detector = _float_model(model, trust=trust, device=target)
            curves = Curves(Path(tensorboard)) if tensorboard else None
        if curves is not None:
            stack.callback(curves.close)
        synthesis = settings.synthesis
        folder = Path(out) if out else cached_folder(detector, synthesis, settings.seed)
        task = stack.enter_context(progress.task("synthesis", synthesis.images, "images"))

        def report(shard: int, stage: str, step: int, steps: int, values: dict[str, float]) -> None:
            task.detail(stage, step, steps, values)
            if curves is not None:
                curves.add(f"shard-{shard:06d}", stage, step, values)

        return synthesize_set(
            detector,
            synthesis,
            settings.seed,
            folder,
            report=report,
            shard_done=task.update,
            left=task.left,
            note=progress.note,
            workers=workers,
            world=world,
        )


def quantize(
    recipe: Recipe | str | Path,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    device: str = "auto",
    trust: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Make a low-bit detector: find or make its calibration set, calibrate, train, save.

    Started in several processes by torchrun, it shares each batch out among them.

    Args:
        recipe: the experiment.
        model: the float detector; None: the recipe's, else what `data` was made from if it is a
            calibration set, else what the newest one in the cache was.
        data: a calibration set or any real one; None: the cache's, made first if it is not there.
        out: run folder; None: `runs/<recipe>-<model>-<n>`.
        name: of the recipe, for that folder.
        device, trust, progress: as for `synthesize`.

    Returns:
        The run folder.

    Raises:
        UserError: for anything the user can mend.
    """
    settings = _as_recipe(recipe)
    stem = name or (Path(recipe).stem if not isinstance(recipe, Recipe) else "recipe")
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(gathered())
        progress = (progress if world.leads else None) or Silent()
        # Tried now, so that a mistake shows before hours of training and before a file is written.
        with world.leader_first():
            source = model if model is not None else settings.model
            made_from = origin_for(data) if source is None and world.leads else None
        # The same for all, whatever is finished in the cache meanwhile.
        made_from = world.share(made_from)
        with world.leader_first():
            target = _own_device(world, device)
            if made_from is not None:
                source = made_from.model
                detector = _float(made_from.load(trust=trust, device=target))
                progress.note(f"model: {source}, which {made_from.set} was made from")
            else:
                detector = _float_model(source, trust=trust, device=target)
            settings = settings.model_copy(update={"model": str(source)})
            measured_on = _labelled_set(settings.evaluation.data, settings, detector)
            select_on = _labelled_set(settings.distillation.select_on, settings, detector)
            teacher = fold(detector.twin())
            insert_quantizers(teacher.twin(), policy_of(settings))
            calibration = None if data is None else _training_data(data, settings, detector)
        if calibration is None:
            calibration = synthesize(detector, settings, device=device, progress=progress)
        identity = {
            "checkpoint": detector.fingerprint,
            "recipe": identity_of_recipe(settings),
            "data": data_identity(calibration, data),
        }
        run = None
        with world.leader_first():
            if world.leads:
                numbered = f"{stem}-{Path(detector.source).stem}"
                run = open_run(Path(out) if out else None, Path("runs"), numbered, identity)
                if not run.finished:
                    stack.enter_context(run.lock())
                if run.finished:
                    # Asked again: the one that held the lock before may have finished it.
                    check_run(run.folder)
        found = (run.folder, run.finished) if run else None
        folder, finished = world.share(found)
        if not finished:
            if run is not None:
                write_atomic(folder / "recipe.yaml", settings.to_yaml().encode())
                origin = data or "synthesis"
                run.log(f"model {detector.source}, {len(calibration)} images from {origin}")
            log = run.log if run is not None else lambda _: None
            where = (calibration, folder, log, progress, world)
            policy = mixed_policy(teacher, settings, *where)
            trained = train(teacher, policy, settings, *where, select_on)
            if run is not None:
                images = len(calibration)
                _finish(run, teacher, policy, trained, settings, images, measured_on, progress)
        return folder


def _own_device(world: World, device: str) -> str:
    """The device of this process, checked to be there."""
    target = pick_device(device_for(world, device))
    if target.startswith("cuda:") and world.size > 1:
        # Otherwise all processes take memory on the first one as well.
        torch.cuda.set_device(target)
    return target


def _labelled_set(source: str | None, settings: Recipe, detector: Detector) -> ImageSet | None:
    """A set to measure on, checked; None where none is named."""
    if not source:
        return None
    images = open_set(source)
    require_labels(images)
    images.category_mapping(detector.names)
    size = settings.evaluation.image_size or detector.image_size
    detector.check_size(size, "evaluation.image_size")
    return images


def _training_data(data: str | Path, settings: Recipe, detector: Detector) -> LabelledImages:
    found = open_training_data(data, detector, settings.synthesis.image_size)
    unlabelled = isinstance(found, LetterboxedImages) and not found.images.labelled
    if unlabelled and settings.distillation.weights.task > 0:
        raise UserError(
            f"{data}: has no labels for the task loss; "
            "use a labelled set or --set distillation.weights.task=0"
        )
    return found


def _finish(
    run: Run,
    teacher: Detector,
    policy: Policy,
    trained: tuple[Detector, Outcome | None, str],
    settings: Recipe,
    images: int,
    measured_on: ImageSet | None,
    progress: Progress,
) -> None:
    """Measure and save what training gave."""
    student, outcome, selected = trained
    # As it will be loaded: another memory layout sums in another order.
    student.module.to(memory_format=torch.contiguous_format)
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
    if measured_on is not None:
        metrics["evaluation"] = measure(teacher, student, measured_on, settings, progress)
    run.finish(student, policy, metrics, {"versions": versions()})
    run.log(f"finished: {selected}")


def sensitivity(
    model: str | Path | Detector,
    recipe: Recipe | str | Path | None = None,
    *,
    data: str | Path | None = None,
    device: str = "auto",
    trust: bool = False,
    progress: Progress | None = None,
) -> Sensitivity:
    """What each layer's bits do to the predictions, and which to give it under a budget.

    Args:
        model: the float detector.
        recipe: whose `quantization` section counts; None: the defaults. Without a
            `quantization.mixed.budget`, nothing is chosen.
        data: a calibration set or any real one; None: the cache's, made first if it is not there.
        device, trust, progress: as for `synthesize`.

    Raises:
        UserError: for anything the user can mend.
    """
    settings = _as_recipe(recipe)
    with gathered() as world:
        progress = (progress if world.leads else None) or Silent()
        with world.leader_first():
            target = _own_device(world, device)
            if isinstance(model, Detector):
                detector = _float(model).to(target)
            else:
                detector = _float_model(model, trust=trust, device=target)
            images = (
                None
                if data is None
                else open_training_data(data, detector, settings.synthesis.image_size)
            )
        if images is None:
            images = synthesize(detector, settings, device=device, progress=progress)
        found = None
        with world.leader_first():
            if world.leads:
                policy, section = policy_of(settings), settings.quantization
                found = find_bits(fold(detector.twin()), policy, section, images, progress)
        shared: Sensitivity = world.share(found)
        return shared


def evaluate(
    model: str | Path | Detector,
    data: str | Path,
    *,
    image_size: int | None = None,
    device: str = "auto",
    trust: bool = False,
    progress: Progress | None = None,
) -> Metrics:
    """COCO AP of a float detector or a run on a labelled set; fractions in [0, 1].

    Raises:
        UserError: for anything the user can mend.
    """
    images = open_set(data)
    target = pick_device(device)
    if isinstance(model, Detector):
        detector = model.to(target)
    else:
        detector = load_model(model, trust=trust, device=target)
    progress = progress or Silent()
    with progress.task("evaluation", len(images), "images") as task:
        return evaluate_detector(detector, images, image_size=image_size, progress=task.update)


def inspect(model: str | Path | Detector, *, trust: bool = False) -> Inspection:
    """Every conv and linear layer of a detector or a run, its shape, MACs and bits; how many of its
    sums and concatenations of activations are quantized."""
    detector = model if isinstance(model, Detector) else load_model(model, trust=trust)
    layers, joins = describe(detector), count_joins(detector)
    return Inspection(detector.source, detector.family, detector.image_size, layers, joins)

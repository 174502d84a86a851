"""`dfq quantize`: a low-bit detector from a recipe."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ..graph.fold_batchnorm import fold
from ..mixed_precision.policy import mixed_policy
from ..mixed_precision.search import check_budget_can_be_kept
from ..quantization.insertion import insert_quantizers
from ..recipe import Recipe, changed_recipe
from ..recipe_overrides import Overrides
from ..runs.folder import Run, check_run, identity_of_recipe, open_run
from ..runs.held_out import hold_out
from ..runs.inputs import (
    WithPhotographs,
    labelled_set,
    photographs,
    remark,
    require_side,
    training_data,
)
from ..runs.loading import load_float, require_float
from ..runs.pipeline import data_identity, train
from ..runs.set_cache import origin_for
from ..runtime.distributed import gathered
from ..runtime.files import require_output_folder, short_name, user_path, write_atomic
from ..runtime.surroundings import Report, own_device, reporter
from ..runtime.tensorboard import Curves, WithCurves
from .evaluate import evaluate as evaluate
from .finishing import finish
from .synthesize import synthesize


def quantize(
    recipe: Recipe | str | Path,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    image_size: int | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    seed: int | None = None,
    select_on: str | None = None,
    photos: str | Path | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
    tensorboard: str | Path | None = None,
) -> Path:
    """Make a low-bit detector: find or make its calibration set, calibrate, train, save.

    Started in several processes by torchrun, it shares each batch out among them.

    Args:
        recipe: the experiment.
        model: the float detector; None: the recipe's, else what `data` was made from if it is a
            calibration set, else what the newest one in the cache was.
        data: a calibration set or any real one; None: the cache's, made first if it is not there.
        image_size: side in pixels of the images to train on, made or real; None: the recipe's.
        out: run folder; None: `runs/<recipe>-<model>-<n>`.
        name: of the recipe, for that folder.
        seed: None: the recipe's.
        select_on: a labelled real set, whose AP chooses the epoch; None: the recipe's.
        photos: real images, whose labels do not count; how close the low-bit network is to the
            float one on them is measured at the end and never steers the training. None: none.
        overrides, device, trust, progress: as for `synthesize`.
        tensorboard: a folder for the curves of the loss, of the training too.

    Returns:
        The run folder.

    Raises:
        UserError: for anything the user can mend.
    """
    settings = changed_recipe(
        recipe,
        overrides,
        seed=seed,
        distillation__select_on=select_on,
        synthesis__image_size=image_size,
    )
    stem = name or (Path(recipe).stem if not isinstance(recipe, Recipe) else "recipe")
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(gathered())
        progress = reporter(progress, world.leads)
        # Tried now, so that a mistake shows before hours of training and before a file is written.
        with world.leader_first():
            if out is not None:
                out = user_path(out)
                require_output_folder(out, "out")
            source = model if model is not None else settings.model
            made_from = origin_for(data) if source is None and world.leads else None
        # The same for all, whatever is finished in the cache meanwhile.
        made_from = world.share(made_from)
        with world.leader_first():
            target = own_device(world, device)
            if made_from is not None:
                source = made_from.model
                detector = require_float(made_from.load(trust=trust, device=target))
                progress.note(f"model: {source}, which {made_from.set} was made from")
            else:
                detector = load_float(source, trust=trust, device=target)
            settings = settings.model_copy(update={"model": str(source)})
            measured_on = labelled_set(settings.evaluation.data, settings, detector)
            selected_on = labelled_set(settings.distillation.select_on, settings, detector)
            pictures = photographs(photos, settings, detector)
            teacher = fold(detector.twin())
            insert_quantizers(teacher.twin(), settings.quantization.policy())
            if settings.quantization.mixed.budget is not None:
                check_budget_can_be_kept(
                    teacher, settings.quantization.policy(), settings.quantization
                )
            calibration = None if data is None else training_data(data, settings, detector)
            if calibration is not None and image_size is not None:
                require_side(calibration, image_size)
            curves = Curves(Path(tensorboard), goes_on=True) if tensorboard else None
        if curves is not None:
            stack.callback(curves.close)
        if calibration is None:
            calibration = synthesize(
                detector, settings, device=device, progress=progress, tensorboard=tensorboard
            )
        identity: dict[str, Any] = {
            "checkpoint": detector.fingerprint,
            "recipe": identity_of_recipe(settings),
            "data": data_identity(calibration, data),
        }
        if pictures is not None:
            identity["photos"] = [str(pictures.source), len(pictures)]
        run: Run | None = None
        with world.leader_first():
            if world.leads:
                numbered = f"{short_name(stem)}-{short_name(Path(detector.source).stem)}"
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
                if (left_out := remark(calibration)) is not None:
                    run.log(left_out)
            log = run.log if run is not None else lambda _: None
            told = progress if curves is None else WithCurves(progress, curves)
            made_on, looked = hold_out(calibration)
            where = (made_on, folder, log, told, world)
            policy = mixed_policy(teacher, settings, *where)
            joined = None
            if pictures is not None:
                joined = WithPhotographs(pictures, made_on, detector)
                pictures = joined.left
            trained = train(teacher, policy, settings, *where, selected_on, joined)
            if run is not None:
                images = len(calibration)
                measured = (measured_on, pictures)
                finish(run, teacher, policy, trained, settings, images, looked, *measured, progress)
        return folder

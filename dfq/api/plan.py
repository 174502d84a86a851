"""Everything that `dfq quantize` is given, opened and checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.pixels import LabelledImages
from ..evaluation.measuring import RealSet
from ..graph.outline import outline
from ..mixed_precision.search import check_budget_can_be_kept
from ..models.base import Model
from ..ptq.pipeline import float_start
from ..quantization.insertion import insert_quantizers
from ..recipe import Recipe
from ..runs.folder import check_run, open_run
from ..runs.identity import contents, identity_of_recipe
from ..runs.inputs import labelled_set, photographs, remark, require_side, training_data
from ..runs.loading import require_float
from ..runs.pipeline import data_identity
from ..runs.set_cache import origin_for
from ..runs.shared import SharedRun
from ..runtime.files import write_atomic
from ..runtime.unfinished import short_name
from .job import Job


@dataclass(frozen=True)
class Plan:
    """What to make a low-bit network of, and from what.

    Attributes:
        recipe: the experiment, with the model that it is of.
        detector: the float network.
        teacher: the same, its BatchNorm folded.
        images: a set to calibrate and train on; None: one is to be synthesized.
        source: what the user named for it.
        measured_on, selected_on: labelled real sets; None: none.
        photos: real images without their labels; None: none.
    """

    recipe: Recipe
    detector: Model
    teacher: Model
    images: LabelledImages | None
    source: str | Path | None
    measured_on: RealSet | None
    selected_on: RealSet | None
    photos: RealSet | None


def prepare(
    recipe: Recipe,
    job: Job,
    *,
    model: str | Path | None,
    data: str | Path | None,
    image_size: int | None,
    photos: str | Path | None,
    quick: bool = False,
    trust: bool,
) -> Plan:
    """Open and check all of it, so that a mistake shows before hours of training and before a file
    is written.

    Args:
        recipe: the experiment.
        job: whose device is used.
        model, data, image_size, photos, quick, trust: as for `quantize`.

    Raises:
        UserError: for the first thing that does not fit.
    """
    source = model if model is not None else recipe.model
    with job.main_process_first():
        made_from = origin_for(data) if source is None and job.is_main_process else None
    # The same for all, whatever is finished in the cache meanwhile.
    made_from = job.world.broadcast(made_from)
    with job.main_process_first():
        if made_from is not None:
            source = made_from.model
            detector = require_float(made_from.load(trust=trust, device=job.device))
            job.progress.note(f"model: {source}, which {made_from.set} was made from")
        else:
            detector = job.float_detector(source, trust=trust)
        recipe = recipe.model_copy(update={"model": str(source)})
        if quick:
            recipe = job.quickly(recipe, detector, data=data, trains=recipe.method != "ptq")
        measured_on = labelled_set(recipe.evaluation.data, recipe, detector)
        selected_on = labelled_set(recipe.distillation.select_on, recipe, detector)
        pictures = photographs(photos, recipe, detector)
        # Known from here on, to all that is made of this network.
        outline(detector)
        section = recipe.quantization
        teacher = float_start(detector.clone(), section, job.progress)
        insert_quantizers(teacher.clone(), section.policy())
        if section.mixed.budget is not None:
            check_budget_can_be_kept(teacher, section.policy(), section)
        images = None if data is None else training_data(data, recipe, detector)
        if images is not None and image_size is not None:
            require_side(images, image_size)
    return Plan(recipe, detector, teacher, images, data, measured_on, selected_on, pictures)


def begin_run(plan: Plan, images: LabelledImages, job: Job, name: str) -> SharedRun:
    """The run folder of a plan: a new one, or the one that the same command left, locked while the
    job lasts.

    Args:
        plan: what is to be done.
        images: the set that it is done with.
        job: whose `out` is the folder; where it names none, `runs/NAME-MODEL-N` is.
        name: of the recipe.

    Raises:
        UserError: the folder holds something else, another process works in it, or its files are
            not what they were.
    """
    identity: dict[str, Any] = {
        "checkpoint": plan.detector.fingerprint,
        "recipe": identity_of_recipe(plan.recipe),
        "data": data_identity(images, plan.source),
    }
    if plan.photos is not None:
        identity["photos"] = [str(plan.photos.source), len(plan.photos)]
    run = None
    with job.main_process_first():
        if job.is_main_process:
            data = None if plan.source is None else images
            identity |= contents(data=data, photos=plan.photos, select_on=plan.selected_on)
            numbered = f"{short_name(name)}-{short_name(Path(plan.detector.source).stem)}"
            run = open_run(job.out, Path("runs"), numbered, identity)
            if not run.finished:
                job.hold(run.lock())
            if run.finished:
                # Asked again: the one that held the lock before may have finished it.
                check_run(run.folder)
    folder, finished = job.broadcast((run.folder, run.finished) if run else None)
    shared = SharedRun(folder, finished, run)
    if run is not None and not finished:
        write_atomic(folder / "recipe.yaml", plan.recipe.to_yaml().encode())
        shared.log(
            f"model {plan.detector.source}, {len(images)} images from {plan.source or 'synthesis'}"
        )
        if (left_out := remark(images)) is not None:
            shared.log(left_out)
    return shared

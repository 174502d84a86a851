"""`dfq quantize`: a low-bit detector from a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..errors import shown
from ..mixed_precision.policy import choose_bits
from ..recipe import Recipe, changed_recipe
from ..recipe.overrides import Overrides
from ..runs.folder import read_metrics
from ..runs.held_out import hold_out
from ..runs.inputs import WithPhotographs
from ..runs.pipeline import ptq_then_qat
from ..runtime.progress import Progress
from ..runtime.surroundings import Report
from .expected import foretell
from .finishing import finish
from .job import Job
from .plan import begin_run, prepare
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
    quick: bool = False,
    overrides: Overrides = (),
    device: str = "auto",
    trust: bool = False,
    max_cache: float = 2.0,
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
        quick, overrides, device, trust, progress: as for `synthesize`.
        max_cache: GiB of what goes in and out of a block that are kept while it is reconstructed.
        tensorboard: a folder for the curves of the loss, of the training too.

    Returns:
        The run folder.

    Raises:
        UserError: for anything the user can mend.

    Example:
        >>> ptq = {"method": "ptq"}
        >>> run = dfq.quantize("w8a8", model="demo", data="set", out="run", overrides=ptq)
        >>> sorted(path.name for path in run.glob("m*"))
        ['manifest.json', 'metrics.json', 'model.safetensors']
    """
    settings = changed_recipe(
        recipe,
        overrides,
        quick=quick,
        seed=seed,
        distillation__select_on=select_on,
        synthesis__image_size=image_size,
    )
    name = name or (Path(recipe).stem if not isinstance(recipe, Recipe) else "recipe")
    with Job.start(device, progress, out=out) as job:
        plan = prepare(
            settings,
            job,
            model=model,
            data=data,
            image_size=image_size,
            photos=photos,
            quick=quick,
            trust=trust,
        )
        with job.main_process_first():
            job.draw_curves(tensorboard, goes_on=True)
        images = plan.images
        if images is None:
            foretell(job, plan, None)
            images = synthesize(
                plan.detector,
                plan.recipe,
                device=device,
                progress=job.progress,
                tensorboard=tensorboard,
            )
        run = begin_run(plan, images, job, name)
        if run.finished and job.is_main_process:
            tell_unmeasured(run.folder, plan.recipe, job.progress)
        if not run.finished:
            foretell(job, plan, images)
            made_on, looked = hold_out(images)
            joined = None
            if plan.photos is not None:
                joined = WithPhotographs(plan.photos, made_on, plan.detector)
            policy = choose_bits(
                plan.teacher,
                plan.recipe.quantization,
                made_on,
                run.folder,
                run.log,
                job.reports,
                job.world,
            )
            result = ptq_then_qat(
                plan.teacher,
                policy,
                plan.recipe,
                made_on,
                run,
                job.reports,
                job.world,
                calibration=joined,
                select_on=plan.selected_on,
                held_out=looked.data.load(looked.indices) if looked.held_out else None,
                room=int(max_cache * 1024**3),
            )
            if run.writable is not None:
                left = None if joined is None else joined.left
                finish(run.writable, plan, policy, result, len(images), looked, left, job.progress)
        return run.folder


def tell_unmeasured(folder: Path, recipe: Recipe, progress: Progress) -> None:
    """Say of a finished run, which is given back as it is, that it was not measured on the set that
    is asked for now: that set fixes nothing of the run, and makes it no other."""
    wanted, measured = recipe.evaluation.data, read_metrics(folder).get("evaluation")
    if wanted is None or (isinstance(measured, dict) and measured.get("data") == wanted):
        return
    command = shlex.join(["dfq", "eval", "--model", str(folder), "--data", wanted])
    progress.note(
        f"the run is finished already, and was not measured on {shown(wanted)}: {command} does"
    )

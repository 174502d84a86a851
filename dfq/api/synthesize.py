"""`dfq synthesize`: the calibration set of a detector."""

from __future__ import annotations

from pathlib import Path

from ..data.calibration_set import CalibrationSet
from ..models.base import Model
from ..recipe import Recipe, as_noise, changed_recipe
from ..recipe.overrides import Overrides
from ..runs.set_cache import cached_folder
from ..runtime.progress import advise
from ..runtime.surroundings import Report
from ..synthesis.pipeline import synthesize_set
from .job import Job
from .shorter import shorter, ways_of_synthesis


def synthesize(
    model: str | Path | Model,
    recipe: Recipe | str | Path | None = None,
    *,
    out: str | Path | None = None,
    images: int | None = None,
    image_size: int | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    labels: str | None = None,
    init: str | None = None,
    quick: bool = False,
    seed: int | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
    workers: int | None = None,
    shards_at_once: int | None = None,
    tensorboard: str | Path | None = None,
) -> CalibrationSet:
    """Make the calibration set of a detector, or find the one that is already there.

    Started in several processes by torchrun, it shares the work out among them.

    Args:
        model: checkpoint, yaml, published name, "demo", or a loaded detector.
        recipe: whose `synthesis` section and `seed` count; None: the defaults.
        out: folder; None: the cache, under a name made from what determines the set.
        images, image_size, iterations, batch_size, labels, init: values of the `synthesis` section;
            None: the recipe's. An `init` of "noise" is Gaussian noise that stays as it is, without
            labels unless some are asked for.
        quick: fewer and smaller images, fewer iterations (`dfq.recipe.quick`), where neither
            another argument nor a `Recipe` that was read already says how many.
        seed: None: the recipe's.
        overrides: any values of the recipe.
        device: "auto", "cpu", "cuda:0", ...
        trust: run what is in the checkpoint.
        progress: told how far it is; True: shown on standard error.
        workers: processes on this machine; None: on a CPU as many as are worth starting, on a GPU
            one. The set is the same whatever it is.
        shards_at_once: batches that a process optimises side by side, each as it would be alone;
            None: on a GPU as many as are quickest, on a CPU one.
        tensorboard: a folder for the curves of the loss; None: none are written.

    Raises:
        UserError: for anything the user can mend.

    Example:
        >>> quick = {"images": 8, "image_size": 64, "iterations": 2, "labels": "single"}
        >>> made = dfq.synthesize("demo", out="set", **quick)
        >>> len(made), made.load([0]).shape
        (8, torch.Size([1, 3, 64, 64]))
    """
    init, iterations, labels = as_noise(init, iterations, labels, overrides)
    settings = changed_recipe(
        recipe,
        overrides,
        quick=quick,
        seed=seed,
        synthesis__images=images,
        synthesis__image_size=image_size,
        synthesis__iterations=iterations,
        synthesis__batch_size=batch_size,
        synthesis__labels=labels,
        synthesis__init=init,
    )
    with Job.start(device, progress, out=out) as job:
        with job.main_process_first():
            detector = job.float_detector(model, trust=trust)
            job.draw_curves(tensorboard)
        if quick:
            settings = job.quickly(settings, detector)
        synthesis = settings.synthesis
        ways = ways_of_synthesis(settings, detector, workers)
        advise(job.progress, "synthesis", shorter(ways, detector))
        folder = job.out or cached_folder(detector, synthesis, settings.seed)
        with job.progress.task("synthesis", synthesis.images, "images") as task:

            def report(
                shard: int, stage: str, step: int, steps: int, values: dict[str, float]
            ) -> None:
                task.detail(stage, step, steps, values)
                if job.curves is not None:
                    job.curves.add(f"shard-{shard:06d}", stage, step, values)

            return synthesize_set(
                detector,
                synthesis,
                settings.seed,
                folder,
                report=report,
                shard_done=task.update,
                left=task.left,
                note=job.progress.note,
                workers=workers,
                at_once=shards_at_once,
                world=job.world,
            )

"""`dfq synthesize`: the calibration set of a detector."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..data.calibration_set import CalibrationSet
from ..models.base import Detector
from ..recipe import Recipe, as_noise, changed_recipe
from ..recipe_overrides import Overrides
from ..runs.loading import load_float, require_float
from ..runs.set_cache import cached_folder
from ..runtime.distributed import gathered
from ..runtime.files import require_output_folder, user_path
from ..runtime.surroundings import Report, own_device, reporter
from ..runtime.tensorboard import Curves
from ..synthesis.pipeline import synthesize_set
from .evaluate import evaluate as evaluate


def synthesize(
    model: str | Path | Detector,
    recipe: Recipe | str | Path | None = None,
    *,
    out: str | Path | None = None,
    images: int | None = None,
    image_size: int | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    labels: str | None = None,
    init: str | None = None,
    seed: int | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
    workers: int | None = None,
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
        seed: None: the recipe's.
        overrides: any values of the recipe.
        device: "auto", "cpu", "cuda:0", ...
        trust: run what is in the checkpoint.
        progress: told how far it is; True: shown on standard error.
        workers: processes on this machine's CPU cores; None: as many as are worth starting. The set
            is the same whatever it is.
        tensorboard: a folder for the curves of the loss; None: none are written.

    Raises:
        UserError: for anything the user can mend.
    """
    init, iterations, labels = as_noise(init, iterations, labels, overrides)
    settings = changed_recipe(
        recipe,
        overrides,
        seed=seed,
        synthesis__images=images,
        synthesis__image_size=image_size,
        synthesis__iterations=iterations,
        synthesis__batch_size=batch_size,
        synthesis__labels=labels,
        synthesis__init=init,
    )
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(gathered())
        progress = reporter(progress, world.leads)
        with world.leader_first():
            if out is not None:
                out = user_path(out)
                require_output_folder(out, "out")
            target = own_device(world, device)
            if isinstance(model, Detector):
                detector = require_float(model).to(target)
            else:
                detector = load_float(model, trust=trust, device=target)
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

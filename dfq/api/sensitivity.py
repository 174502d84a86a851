"""`dfq sensitivity`: what each layer's bits cost, and where bits are best spent."""

from __future__ import annotations

from pathlib import Path

from ..data.training_images import open_training_data
from ..mixed_precision.search import Sensitivity, check_budget_can_be_kept, find_bits
from ..models.base import Model
from ..ptq.pipeline import float_start
from ..recipe import Recipe, changed_recipe
from ..recipe.overrides import Overrides
from ..runtime.surroundings import Report
from .evaluate import evaluate as evaluate
from .job import Job
from .synthesize import synthesize


def sensitivity(
    model: str | Path | Model,
    recipe: Recipe | str | Path | None = None,
    *,
    data: str | Path | None = None,
    budget: str | float | None = None,
    cost: str | None = None,
    images: int | None = None,
    seed: int | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
) -> Sensitivity:
    """What each layer's bits do to the predictions, and which to give it under a budget.

    Args:
        model: the float detector.
        recipe: whose `quantization` section counts; None: the defaults. Without a
            `quantization.mixed.budget`, nothing is chosen.
        data: a calibration set or any real one; None: the cache's, made first if it is not there.
        budget, cost, images: values of the `quantization.mixed` section; None: the recipe's.
        seed, overrides, device, trust, progress: as for `synthesize`.

    Raises:
        UserError: for anything the user can mend.

    Example:
        >>> widths = {"quantization.mixed.candidates": [4, 8]}
        >>> measured = dfq.sensitivity("demo", data="set", images=1, overrides=widths)
        >>> len(measured.layers) == len(dfq.inspect("demo").layers)
        True
    """
    settings = changed_recipe(
        recipe,
        overrides,
        seed=seed,
        quantization__mixed__budget=budget,
        quantization__mixed__cost=cost,
        quantization__mixed__images=images,
    )
    section = settings.quantization
    with Job.start(device, progress) as job:
        with job.main_process_first():
            detector = job.float_detector(model, trust=trust)
            teacher = float_start(detector.clone(), section, job.progress)
            policy = section.policy()
            check_budget_can_be_kept(teacher, policy, section)
            calibration = None
            if data is not None:
                calibration = open_training_data(data, detector, settings.synthesis.image_size)
        if calibration is None:
            calibration = synthesize(detector, settings, device=device, progress=job.progress)
        measured = None
        with job.main_process_first():
            if job.is_main_process:
                measured = find_bits(teacher, policy, section, calibration, job.progress)
        return job.broadcast(measured)

"""`dfq sensitivity`: what each layer's bits cost, and where bits are best spent."""

from __future__ import annotations

from pathlib import Path

from ..data.training_images import open_training_data
from ..graph.fold_batchnorm import fold
from ..mixed_precision.search import Sensitivity, check_budget_can_be_kept, find_bits
from ..models.base import Detector
from ..recipe import Recipe, changed_recipe
from ..recipe_overrides import Overrides
from ..runs.loading import load_float, require_float
from ..runtime.distributed import gathered
from ..runtime.surroundings import Report, own_device, reporter
from .evaluate import evaluate as evaluate
from .synthesize import synthesize


def sensitivity(
    model: str | Path | Detector,
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
    """
    settings = changed_recipe(
        recipe,
        overrides,
        seed=seed,
        quantization__mixed__budget=budget,
        quantization__mixed__cost=cost,
        quantization__mixed__images=images,
    )
    with gathered() as world:
        progress = reporter(progress, world.leads)
        with world.leader_first():
            target = own_device(world, device)
            if isinstance(model, Detector):
                detector = require_float(model).to(target)
            else:
                detector = load_float(model, trust=trust, device=target)
            teacher, policy = fold(detector.twin()), settings.quantization.policy()
            check_budget_can_be_kept(teacher, policy, settings.quantization)
            calibration = (
                None
                if data is None
                else open_training_data(data, detector, settings.synthesis.image_size)
            )
        if calibration is None:
            calibration = synthesize(detector, settings, device=device, progress=progress)
        found = None
        with world.leader_first():
            if world.leads:
                found = find_bits(teacher, policy, settings.quantization, calibration, progress)
        shared: Sensitivity = world.share(found)
        return shared

"""The policy of a recipe, with each layer's bits found where it gives a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..data.pixels import LabelledImages
from ..errors import UserError
from ..models.base import Model
from ..quantization.policy import Policy
from ..quantization.settings import Quantization
from ..runtime.distributed import World
from ..runtime.files import read_json, write_json
from ..runtime.progress import Progress
from .search import find_bits


def choose_bits(
    teacher: Model,
    section: Quantization,
    data: LabelledImages,
    folder: Path,
    log: Callable[[str], None],
    progress: Progress,
    world: World,
) -> Policy:
    """Each layer's bits: those that the settings give, or that fit best into their budget.

    What was found is kept in the run folder as `sensitivity.json`, where a run that goes on finds
    it.

    Args:
        teacher: the folded float detector.
        section: settings of quantization.
        data: images to measure on.
        folder: of the run.
        log: takes lines for the run's log.
        progress: told how far it is.
        world: the processes of the job; one measures, all get the same.

    Raises:
        UserError: as `find_bits`, and where `sensitivity.json` is broken.
    """
    policy = section.policy()
    if section.mixed.budget is None:
        return policy
    with world.main_process_first():
        if world.is_main_process:
            path = folder / "sensitivity.json"
            if not path.is_file():
                sensitivity = find_bits(teacher, policy, section, data, progress)
                write_json(path, sensitivity.to_dict())
                log(
                    f"bits by layer: {sensitivity.spent:.4g} of {sensitivity.budget:.4g} "
                    f"{sensitivity.kind}"
                )
            overrides = read_bits(path)["overrides"]
            policy = replace(policy, overrides=(*policy.overrides, *overrides.items()))
    shared: Policy = world.broadcast(policy)
    return shared


def read_bits(path: Path) -> dict[str, Any]:
    """What a run's `sensitivity.json` holds.

    Raises:
        UserError: where it is broken.
    """
    sensitivity = read_json(path)
    try:
        if not {"cost", "budget", "spent", "divergence"} <= sensitivity.keys():
            raise KeyError
        Quantization.model_validate({"overrides": sensitivity["overrides"]})
    except (AttributeError, KeyError, ValidationError):
        raise UserError(f"{path}: not as dfq wrote it; delete it to measure again") from None
    return dict(sensitivity)

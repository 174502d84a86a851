"""What of a recipe makes a run this run and no other, whichever version wrote it."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import ValidationError

from ..recipe import Recipe
from ..recipe.removed import under_present_names, without_removed


def in_todays_keys(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as this version would write it: keys that the recipe did not have yet when the
    run was made have their defaults, which leave everything as it was; those that it has no more
    are left out where they changed nothing."""
    try:
        values = copy.deepcopy(identity["recipe"])
        under_present_names(values)
        without_removed(values, neutral=True)
        recipe = Recipe.model_validate(values)
    except (KeyError, ValidationError):
        return identity
    return {**identity, "recipe": identity_of_recipe(recipe)}


def identity_of_recipe(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe fixes a run's result."""
    return recipe.model_dump(mode="json", exclude={"evaluation", "model"})

"""What makes a run this run and no other, whichever version wrote it."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import ValidationError

from ..data.class_set import ClassSet
from ..data.content import content_digest
from ..data.cropped_images import CroppedImages
from ..data.image_set import ImageSet
from ..data.training_images import LetterboxedImages
from ..recipe import Recipe
from ..recipe.removed import under_present_names, without_removed

_CONTENT = ": content"


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


def contents(**sets: object) -> dict[str, str]:
    """Keys of an identity that tell real sets from others in their place.

    Args:
        sets: by the option that names each; synthetic ones, whose checksums are known, and None are
            left out.

    Raises:
        UserError: an image cannot be read.
    """
    told = {}
    for name, images in sets.items():
        if isinstance(images, LetterboxedImages | CroppedImages):
            images = images.images
        if isinstance(images, ImageSet | ClassSet):
            told[f"{name}{_CONTENT}"] = content_digest(images)
    return told


def differing(recorded: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The keys in which a recorded identity is not the one that is wanted. What real sets held,
    earlier versions did not record: there their names and sizes have to do."""
    return sorted(
        key
        for key in {*recorded, *wanted}
        if recorded.get(key) != wanted.get(key) and (key in recorded or not key.endswith(_CONTENT))
    )

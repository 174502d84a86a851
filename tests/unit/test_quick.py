"""`--quick`: what it lowers, and what is stronger than it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dfq.cli.options import settings_of
from dfq.errors import UserError
from dfq.recipe import changed_recipe, load_recipe
from dfq.recipe.quick import QUICK, quick_side


def values(recipe: Any) -> dict[str, int]:
    found = {}
    for key in QUICK:
        value = recipe
        for part in key.split("."):
            value = getattr(value, part)
        found[key] = value
    return found


def test_quick_lowers_what_defaults_and_recipes_have_more_of(tmp_path: Path) -> None:
    assert values(load_recipe(None, quick=True)) == QUICK
    paper = load_recipe("paper-yolov5", quick=True)
    assert values(paper) == {**QUICK, "distillation.epochs": 6}
    file = tmp_path / "own.yaml"
    file.write_text(
        "synthesis: {images: 8, image_size: 1280, label_stage: }\ndistillation: {epochs: 3}\n"
    )
    own = load_recipe(file, quick=True)
    assert own.synthesis.image_size is None
    assert values(own) == {**QUICK, "synthesis.images": 8, "distillation.epochs": 3}
    file.write_text("synthesis: {image_size: 96}\n")
    assert load_recipe(file, quick=True).synthesis.image_size == 96
    assert load_recipe(file).synthesis.images == 512


def test_options_are_stronger_than_quick() -> None:
    settings = settings_of(
        "w4a8",
        ["distillation.epochs=50"],
        quick=True,
        synthesis__images=300,
        synthesis__image_size=640,
    )
    assert settings.synthesis.images == 300
    assert settings.synthesis.image_size == 640
    assert settings.distillation.epochs == 50
    assert settings.synthesis.iterations == QUICK["synthesis.iterations"]
    # What was read already says all of what it says.
    assert changed_recipe(settings, quick=True) == settings


def test_a_broken_section_is_still_told(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("synthesis: 3\n")
    with pytest.raises(UserError, match="synthesis"):
        load_recipe(file, quick=True)
    file.write_text("synthesis: {images: many}\n")
    with pytest.raises(UserError, match=r"synthesis\.images"):
        load_recipe(file, quick=True)


@pytest.mark.parametrize(
    ("size", "stride", "side"), [(640, 32, 320), (160, 32, 160), (512, 128, 256), (1024, 512, 512)]
)
def test_the_side_is_a_multiple_of_the_stride_and_not_above_the_models(
    size: int, stride: int, side: int
) -> None:
    assert quick_side(cast(Any, SimpleNamespace(image_size=size, stride=stride))) == side

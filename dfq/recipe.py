"""The recipe: one YAML file is one experiment, checked whole before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from .errors import UserError
from .qat.settings import Distillation
from .quantization.settings import Quantization
from .recipe_overrides import Overrides, flat, override
from .runtime.files import user_path
from .runtime.limits import LARGEST_SIDE, MOST_IMAGES
from .runtime.plain import brief, parse_yaml, read_small
from .runtime.settings import Section
from .runtime.suggest import suggestion
from .synthesis.settings import Synthesis


class Evaluation(Section):
    """A measurement once training is over; it never steers the training."""

    data: str | None = None
    image_size: int | None = Field(None, ge=32, le=LARGEST_SIDE)
    batch_size: int = Field(16, ge=1, le=MOST_IMAGES)


class Recipe(Section):
    """One experiment."""

    model: str | None = None
    """Checkpoint, yaml or name of the detector; `--model` wins."""
    method: Literal["qat", "ptq", "auto"] = "auto"
    """`auto` trains, and falls back to the calibrated start where training made it worse or its
    loss stopped being finite; `qat` fails where it did."""
    seed: int = Field(0, ge=0, lt=2**31)
    synthesis: Synthesis = Synthesis()
    quantization: Quantization = Quantization()
    distillation: Distillation = Distillation()
    evaluation: Evaluation = Evaluation()

    @field_validator("model", mode="before")
    @classmethod
    def _source(cls, value: Any) -> Any:
        # A section `model: {source: yolo11s}` reads as `model: yolo11s`.
        if isinstance(value, dict) and set(value) == {"source"}:
            return value["source"]
        return value

    @model_validator(mode="after")
    def _labels_for_task(self) -> Recipe:
        if self.synthesis.labels == "none" and self.distillation.weights.task > 0:
            raise ValueError(
                "distillation.weights.task needs labels, and synthesis.labels is 'none'"
            )
        weights = self.distillation.weights
        if self.method != "ptq" and not (weights.kl > 0 or weights.feature > 0 or weights.task > 0):
            raise ValueError("distillation.weights: all are 0; set one above 0, or method: ptq")
        return self

    def to_yaml(self) -> str:
        """Every value, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name without suffix."""
    here = Path(__file__).resolve().parent
    # An installed package holds them inside; a checkout beside it.
    for folder in (here / "recipes", here.parent / "recipes"):
        found = {p.stem: p for p in sorted(folder.glob("*.yaml"))}
        if found:
            return found
    return {}


def find_recipe(name: str | Path) -> Path:
    """A file of that name, else a shipped recipe (`w4a8` and `w4a8.yaml` alike)."""
    path = user_path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    key = path.name.removesuffix(".yaml").removesuffix(".yml")
    if str(path.parent) == "." and key in shipped:
        return shipped[key]
    raise UserError(
        f"recipe '{name}': no such file, and none is shipped under that name "
        f"(shipped: {', '.join(shipped)}){suggestion(key, shipped)}"
    )


def changed_recipe(
    recipe: Recipe | str | Path | None, overrides: Overrides = (), **values: Any
) -> Recipe:
    """A recipe, read where it is named, with other values; arguments and errors are those of
    `load_recipe`."""
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides, **values)
    if not overrides and all(value is None for value in values.values()):
        return recipe
    data = recipe.model_dump()
    override(data, overrides, values, Recipe)
    return _validated(data, "recipe")


def load_recipe(name: str | Path | None, overrides: Overrides = (), **values: Any) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        name: file or shipped name; None starts from the defaults.
        overrides: values that replace the file's.
        values: the same with `__` for the dot, from command-line options; None means not given.

    Raises:
        UserError: one line for each thing that is wrong, with the key's path.
    """
    data: Any = {}
    origin = "recipe"
    if name is not None:
        path = find_recipe(name)
        origin = str(path.name)
        data = parse_yaml(read_small(path), str(path))
        data = {} if data is None else data
        if not isinstance(data, dict):
            raise UserError(
                f"{path}: a recipe is a mapping of sections, not a {type(data).__name__}"
            )
    override(data, overrides, values, Recipe)
    return _validated(data, origin)


def as_noise(
    init: str | None, iterations: int | None, labels: str | None, overrides: Overrides
) -> tuple[str | None, int | None, str | None]:
    """Start, iterations and labels of synthesis, where the start may be "noise": Gaussian noise
    that stays as it is, without labels unless some are asked for.

    Raises:
        UserError: noise, and iterations.
    """
    if init != "noise":
        return init, iterations, labels
    if isinstance(overrides, Mapping):
        given = {key for key, _ in flat(overrides, Recipe)}
    else:
        given = {text.partition("=")[0] for text in overrides}
    if iterations or "synthesis.iterations" in given:
        raise UserError("--init noise stays as it is: leave the iterations out")
    return "gaussian", 0, labels or (None if "synthesis.labels" in given else "none")


def _validated(data: dict[str, Any], origin: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [f"{origin}: {_explain(problem)}" for problem in error.errors()]
        raise UserError(*dict.fromkeys(lines)) from None


def _explain(problem: Any) -> str:
    where = " ".join(".".join(str(part) for part in problem["loc"]).split())[:200]
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{_meant(where)}"
    message = problem["msg"].removeprefix("Value error, ")
    got = problem.get("input")
    given = f", got {brief(got)}" if not isinstance(got, dict | list | BaseModel) else ""
    return f"{where + ': ' if where else ''}{message[:1].lower()}{message[1:]}{given}"


def _meant(key: str) -> str:
    """What an unknown key was probably meant to be: one written much like it, or one of that name
    in another section."""
    known = _keys(Recipe)
    last = key.rpartition(".")[2]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else suggestion(key, known)


def _keys(section: type[BaseModel], above: str = "") -> list[str]:
    """Every key of a section and of those in it, with dots."""
    names = []
    for name, field in section.model_fields.items():
        names.append(f"{above}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _keys(field.annotation, f"{above}{name}.")
    return names

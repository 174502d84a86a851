"""The recipe: one YAML file is one experiment, checked whole before any work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ..errors import UserError, shown
from ..qat.settings import Distillation
from ..quantization.settings import Quantization
from ..runtime.files import user_path
from ..runtime.limits import LARGEST_SIDE
from ..runtime.plain import brief, parse_yaml, read_small
from ..runtime.settings import Section
from ..runtime.suggest import suggestion
from ..synthesis.settings import Synthesis
from .overrides import Overrides, flat, merged, override
from .quick import lower
from .removed import under_present_names, warn_of_removed, without_removed


class Evaluation(Section):
    """A measurement once training is over; it never steers the training."""

    data: str | None = None
    """A labelled set that float and low-bit network are measured on in the end; None: none."""
    image_size: int | None = Field(None, ge=32, le=LARGEST_SIDE)
    """Side in pixels; None: the model's."""


class Recipe(Section):
    """One experiment."""

    model: str | None = None
    """Checkpoint, yaml or published name of the float detector; `--model` wins."""
    method: Literal["qat", "ptq", "auto"] = "auto"
    """`ptq` finds grids and rounds weights, and trains nothing; `qat` trains after it; `auto`
    trains, and falls back to what PTQ gave where training made it worse or its loss stopped being
    finite, at which `qat` fails."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Fixes the result, synthesis and training alike."""
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
    def _untrained_kinds(self) -> Recipe:
        if self.method == "ptq":
            return self
        if self.quantization.activation_ranges == "dynamic":
            raise ValueError(
                "quantization.activation_ranges: dynamic ones are not trained; set method: ptq"
            )
        if self.quantization.weight_grid == "piecewise":
            raise ValueError(
                "quantization.weight_grid: piecewise grids are not trained; set method: ptq"
            )
        return self

    @model_validator(mode="after")
    def _labels_for_task(self) -> Recipe:
        if self.method == "ptq":
            # Nothing is trained.
            return self
        weights = self.distillation.weights
        if self.synthesis.labels == "none" and weights.task > 0:
            raise ValueError(
                "distillation.weights.task needs labels, and synthesis.labels is 'none'"
            )
        if not (weights.kl or weights.feature or weights.task):
            raise ValueError("distillation.weights: all are 0; set one above 0, or method: ptq")
        return self

    def to_yaml(self) -> str:
        """Every value, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name without suffix."""
    here = Path(__file__).resolve().parents[1]
    # An installed package holds them inside; a checkout beside it.
    for folder in (here / "recipes", here.parent / "recipes"):
        recipes = {p.stem: p for p in sorted(folder.glob("*.yaml"))}
        if recipes:
            return recipes
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
    recipe: Recipe | str | Path | None,
    overrides: Overrides = (),
    *,
    quick: bool = False,
    **values: Any,
) -> Recipe:
    """A recipe, read where it is named, with other values; arguments and errors are those of
    `load_recipe`. One that was read already means all that it says, quick or not."""
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides, quick=quick, **values)
    if not overrides and all(value is None for value in values.values()):
        return recipe
    data = recipe.model_dump()
    stated = override(data, overrides, values, Recipe)
    return _validated(data, "recipe", stated=stated)


def load_recipe(
    name: str | Path | None, overrides: Overrides = (), *, quick: bool = False, **values: Any
) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        name: file or shipped name, whose `extends: NAME` is followed; None starts from the
            defaults.
        overrides: values that replace the file's.
        quick: have the file's values no larger than those of `QUICK`; overrides may be.
        values: the same with `__` for the dot, from command-line options; None means not given.

    Raises:
        UserError: one line for each thing that is wrong, with the key's path.

    Example:
        >>> dfq.load_recipe("w4a8", ["quantization.weight_bits=3"]).quantization.weight_bits
        3
    """
    if name is None:
        data: dict[str, Any] = {}
        if quick:
            lower(data, Recipe)
        stated = override(data, overrides, values, Recipe)
        return _validated(data, "recipe", stated=stated)
    chain = _with_extended(find_recipe(name))
    data = merged([sections for _, sections in chain], Recipe)
    if "method" in data:
        # The file's own: `dfq ptq` puts another in its place.
        _validated({"method": data["method"]}, chain[0][0], chain)
    if quick:
        lower(data, Recipe)
    stated = override(data, overrides, values, Recipe)
    return _validated(data, chain[0][0], chain, stated)


def recorded_recipe(path: Path) -> Recipe:
    """The recipe of a run, from its `recipe.yaml`: keys that there were when it was made and are no
    more are read over.

    Raises:
        UserError: as for `load_recipe`.
    """
    data = _read(path)
    under_present_names(data)
    without_removed(data)
    section = data.get("distillation")
    # Once a rate in quantization steps.
    if isinstance(section, dict) and isinstance(section.get("weight_lr"), int | float):
        section["weight_lr"] = None if section["weight_lr"] > 0 else section["weight_lr"]
    return _validated(data, path.name)


def _read(path: Path) -> dict[str, Any]:
    data = parse_yaml(read_small(path), str(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, not a {type(data).__name__}")
    return data


def _with_extended(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The names and sections of a recipe's file and of those that it extends, itself first.

    Raises:
        UserError: a file cannot be read or found, or extends itself.
    """
    chain: list[tuple[str, dict[str, Any]]] = []
    visited: list[Path] = []
    while True:
        visited.append(path.resolve())
        data = _read(path)
        # Here, where the file's own value is not yet one among those that it extends.
        under_present_names(data, _called(path))
        base = data.pop("extends", None)
        chain.append((_called(path), data))
        if base is None:
            return chain
        following = _extended(base, path)
        if following.resolve() in visited:
            way = " extends ".join(file.name for file in (*visited, following))
            raise UserError(f"{path}: extends goes in a circle: {way}")
        path = following


def _called(path: Path) -> str:
    """A recipe's file in messages: a shipped one by its name, another as it is found."""
    return path.name if path in shipped_recipes().values() else shown(path)


def _extended(name: Any, path: Path) -> Path:
    """The file that `extends: NAME` in the recipe `path` means: one beside it, else a shipped
    recipe."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: extends: should be the name of a recipe, got {brief(name)}")
    named, shipped = user_path(name, f"{path}: extends:"), shipped_recipes()
    beside = path.parent / named
    if beside.is_file():
        return beside
    key = named.name.removesuffix(".yaml").removesuffix(".yml")
    if str(named.parent) == "." and key in shipped:
        return shipped[key]
    with_suffix = beside.parent / f"{beside.name}.yaml"
    if with_suffix.is_file():
        return with_suffix
    raise UserError(
        f"{path}: extends: '{shown(name)}': no such file beside it, and none is shipped under that "
        f"name (shipped: {', '.join(shipped)}){suggestion(key, shipped)}"
    )


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
        overridden = {key for key, _ in flat(overrides, Recipe)}
    else:
        overridden = {text.partition("=")[0] for text in overrides}
    if iterations or "synthesis.iterations" in overridden:
        raise UserError("--init noise stays as it is: leave the iterations out")
    return "gaussian", 0, labels or (None if "synthesis.labels" in overridden else "none")


def _validated(
    data: dict[str, Any],
    origin: str,
    chain: Sequence[tuple[str, dict[str, Any]]] = (),
    stated: Mapping[str, str] = MappingProxyType({}),
) -> Recipe:
    """A recipe of `data`, which `origin` says, or of several files one of those in `chain`, but for
    the keys of `stated`, which options gave."""
    warn_of_removed(data, origin)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{_option(problem, stated) or _origin(problem, chain, origin) + ':'} "
            f"{_explain(problem)}"
            for problem in error.errors()
        ]
        raise UserError(*dict.fromkeys(lines)) from None


def _option(problem: Any, stated: Mapping[str, str]) -> str | None:
    """Which option says what is wrong; None: none does."""
    place = ".".join(str(part) for part in problem["loc"])
    unknown = problem["type"] == "extra_forbidden"
    for key, option in stated.items():
        # Of an unknown section, what is wrong is the section.
        if f"{place}.".startswith(f"{key}.") or (unknown and key.startswith(f"{place}.")):
            return option
    return None


def _origin(problem: Any, chain: Sequence[tuple[str, dict[str, Any]]], otherwise: str) -> str:
    """Which of several files says what is wrong."""
    place = problem["loc"]
    candidates = []
    for name, data in chain:
        value: Any = data
        for part in place:
            value = value.get(part, _NOT_THERE) if isinstance(value, dict) else _NOT_THERE
        if place and value is not _NOT_THERE:
            candidates.append((value != problem["input"], name))
    # What none of them says, several say together.
    return min(candidates, key=lambda pair: pair[0])[1] if candidates else otherwise


_NOT_THERE = object()


def _explain(problem: Any) -> str:
    where = " ".join(".".join(str(part) for part in problem["loc"]).split())[:200]
    if where == "extends":
        return "extends: stands in a recipe's file; name the recipe with --recipe"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{_meant(where)}"
    got = problem.get("input")
    if problem["type"] == "model_type":
        return f"{where}: should be a section of keys, got {brief(got)}"
    message = problem["msg"].removeprefix("Value error, ")
    # What several keys together have wrong, the message says.
    together = problem["type"] == "value_error" and isinstance(got, dict | list)
    clause = "" if together or isinstance(got, BaseModel) else f", got {brief(got)}"
    return f"{where + ': ' if where else ''}{message[:1].lower()}{message[1:]}{clause}"


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

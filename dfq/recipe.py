"""The recipe: one YAML file is one experiment, checked whole before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from .errors import UserError
from .quantization.bit_widths import ALLOWED, Widths, check_budget, parse_widths
from .quantization.placement import PLACEMENTS, Runtime
from .recipe_overrides import Overrides, flat, override
from .runtime.files import user_path
from .runtime.limits import LARGEST_SIDE, LARGEST_WEIGHT, MOST_IMAGES, MOST_STEPS
from .runtime.plain import brief, parse_yaml, read_small
from .runtime.settings import Section
from .runtime.suggest import suggestion
from .synthesis.settings import Synthesis


class Mixed(Section):
    """Mixed precision: every layer gets the bits that its effect on the predictions is worth."""

    budget: str | None = None
    """What all layers together may cost: "w4a8" (as much as these widths throughout), or a number
    such as 12.5G; None: every layer has the same bits."""
    cost: Literal["bit_operations", "bytes"] = "bit_operations"
    """What the budget is in: weight bits * activation bits * MACs of an image, or bytes of the
    weights."""
    candidates: list[int | str] = Field([3, 4, 5, 6, 8])
    """Widths a layer may get: of its weights, or of both as "w4a6"."""
    images: int = Field(16, ge=1, le=MOST_IMAGES)
    """Images of the set that each layer's effect is measured on."""

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, int | float) else value
        if isinstance(text, str):
            check_budget(text)
        return text

    @field_validator("candidates")
    @classmethod
    def _widths(cls, value: list[int | str]) -> list[int | str]:
        if len({str(bits) for bits in value}) < 2:
            raise ValueError("needs two widths or more to choose from")
        for bits in value:
            if parse_widths(bits) is None:
                raise ValueError(f"float is no candidate; {ALLOWED}")
        return value


class Quantization(Section):
    """What is quantized, and to how many bits."""

    weight_bits: int = Field(4, ge=2, le=8)
    activation_bits: int = Field(8, ge=2, le=16)
    first_last_bits: Literal["float", "same", 8] = 8
    """Of the layers that see the image and those that give the predictions."""
    weights: Literal["per_channel", "per_tensor"] = "per_channel"
    weight_grid: Literal["asymmetric", "symmetric"] = "asymmetric"
    """Whether grids of weights below 8 bits may reach further to one side of zero."""
    activations: Literal["asymmetric", "symmetric"] = "asymmetric"
    """With a zero point, or without: then what is never below zero has unsigned integers, where the
    runtime does."""
    ranges: Literal["mse", "minmax", "percentile", "lsq"] = "mse"
    """How the initial scales are found. lsq: as in LSQ, with asymmetric activations as in LSQ+; and
    values beyond the ends of a grid have no gradient, as there."""
    calibration_images: int = Field(64, ge=1, le=MOST_IMAGES)
    """Images of the set the initial scales are found on."""
    refine_images: int = Field(16, ge=0, le=MOST_IMAGES)
    """Images of the set on which the grids that `mse` found for activations of 5 to 7 bits are
    moved to where the predictions stay closest; 0: they stay where they are."""
    rounding: Literal["gptq", "nearest"] = "gptq"
    """How weights get onto their grids, before any training: each making up for the errors of those
    before it, or each to the nearest level."""
    rounding_images: int = Field(512, ge=1, le=MOST_IMAGES)
    """Images of the set that the former looks at."""
    scope: Literal["all", "backbone"] = "all"
    """Layers that are quantized at all; with backbone, neck and heads stay in float."""
    placement: Literal["inputs", "everywhere", "qdq"] = "inputs"
    """Where activations are quantized: on the inputs of layers; also on their outputs (but for the
    predictions) and on all that is added or concatenated; or where `runtime` needs it to compute in
    integers."""
    runtime: Runtime = "onnxruntime"
    """Which runtime `placement: qdq` is for."""
    overrides: dict[str, int | str] = Field({})
    """Layer name or wildcard -> "float", a bit width, or "w4a8"; the first match wins."""
    mixed: Mixed = Mixed()

    @field_validator("overrides")
    @classmethod
    def _bits(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, bits in value.items():
            try:
                parse_widths(bits)
            except ValueError:
                asked = f"{bits} bits" if isinstance(bits, int) else f"'{bits}'"
                raise ValueError(f"'{name}' asks for {asked}; {ALLOWED}, or 'float'") from None
        return value

    @model_validator(mode="after")
    def _kernels(self) -> Quantization:
        widths = [parse_widths(bits) for bits in (*self.overrides.values(), *self.mixed.candidates)]
        most = max(self.activation_bits, *(pair[1] for pair in widths if pair), 0)
        limit = PLACEMENTS[self.runtime].most_bits
        if self.placement == "qdq" and most > limit:
            raise ValueError(f"{self.runtime} has no activations of {most} bits; {limit} at most")
        return self

    def candidates(self) -> list[Widths]:
        """What `mixed.candidates` stands for, as (weight bits, activation bits)."""
        return [
            (bits, self.activation_bits) if isinstance(bits, int) else parse_widths(bits) or (8, 8)
            for bits in self.mixed.candidates
        ]


class DistillationWeights(Section):
    """Weights of the training loss."""

    kl: float = Field(1.0, ge=0, le=LARGEST_WEIGHT)
    """Divergence from the teacher's predictions."""
    feature: float = Field(1.0, ge=0, le=LARGEST_WEIGHT)
    """Squared distance of the distilled layers, in the form `feature_form`."""
    task: float = Field(0.0, ge=0, le=LARGEST_WEIGHT)
    """The family's own training loss on the synthetic labels."""

    @model_validator(mode="after")
    def _something(self) -> DistillationWeights:
        if not (self.kl or self.feature or self.task):
            raise ValueError("all three are 0: there is nothing to train on")
        return self


class Distillation(Section):
    """Stage II: how the low-bit network is trained."""

    epochs: int = Field(6, ge=1, le=MOST_STEPS)
    batch_size: int = Field(16, ge=1, le=MOST_IMAGES)
    lr: float = Field(3e-4, gt=0)
    """Adam, biases and whatever is not quantized; cosine to zero."""
    weight_lr: float | None = Field(0.0, ge=0)
    """Adam, quantized weights, in quantization steps of their channel; 0 keeps the integers they
    were rounded to, and trains step sizes and biases alone; None: `lr`, in units."""
    train_last: bool = True
    """With a `weight_lr` of 0, weights of 8 bits in layers that give the predictions are trained
    all the same, at `lr`."""
    scale_lr: float = Field(1e-3, gt=0)
    """Adam, logarithms of the step sizes; cosine to zero."""
    zero_lr: float = Field(0.0, ge=0, le=1)
    """Adam, zero points of activations, in widths of their grid; cosine to zero. 0: they stay where
    calibration put them, which keeps as much."""
    drift: float = Field(0.5, ge=0, le=LARGEST_WEIGHT)
    """Trained weights stay within so many quantization steps of their start; 0: no bound."""
    dampen: float = Field(0.0, ge=0, le=LARGEST_WEIGHT)
    """Pull of weights towards the level they are rounded to, rising over the training: against
    oscillation at 4 bits and below."""
    freeze: float = Field(0.0, ge=0, lt=1)
    """Weights that jump back and forth in more than this share of the steps are frozen; 0: none."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the rates rise from zero."""
    weights: DistillationWeights = DistillationWeights()
    masks: Literal["ellipse", "own", "none"] = "ellipse"
    """As `synthesis.masks`, for the task loss of the training."""
    kl_form: Literal["family", "flattened"] = "family"
    """Over what is a distribution in the family, or the paper's softmax over a whole level."""
    feature_form: Literal["relative", "absolute"] = "relative"
    """Squared distances of the outputs of blocks, each relative to the teacher's variance; or the
    paper's, of all convolutions and BatchNorms, in units."""
    temperature: float = Field(1.0, gt=0, le=LARGEST_WEIGHT)
    """Of the KL; the paper's flattened form uses 4."""
    clip: float = Field(10.0, gt=0, le=LARGEST_WEIGHT)
    """Largest norm of the gradient."""
    ema: float = Field(0.998, ge=0, lt=1)
    """Decay of the averaged weights; 0 switches them off."""
    selection: Literal["ema", "last", "agreement"] = "ema"
    """Which weights are kept; `agreement` takes those closest to the teacher on the set."""
    select_on: str | None = None
    """A labelled real set: the epoch with the highest AP on it is kept, as the paper does. The run
    is then not data-free, and says so."""
    keep_worse: bool = False
    """With `method: qat`, what was trained is kept even where the calibrated start is better."""
    flip: float = Field(0.5, ge=0, le=1)
    zoom: float = Field(0.0, ge=0, lt=1)
    """Images are enlarged or shrunk at random by up to this share, labels too."""
    mosaic: float = Field(0.0, ge=0, le=1)
    """Probability that a batch is made into mosaics of four images at half their size."""
    colour: float = Field(0.0, ge=0, lt=1)
    """Channels are scaled and shifted at random by up to this share."""
    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    """What convolutions compute in while training; quantizers, losses and parameters stay in
    float32. Auto: bfloat16 where the device computes in it natively."""
    checkpoint_minutes: float = Field(1.0, ge=0, le=LARGEST_WEIGHT)
    """A checkpoint is written at the first epoch's end after so many minutes."""


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

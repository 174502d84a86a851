"""The `quantization` section of a recipe: what is quantized, and to how many bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..runtime.limits import MOST_IMAGES, MOST_STEPS
from ..runtime.settings import Section
from .bit_widths import ALLOWED, Widths, check_budget, parse_widths
from .piecewise import LEAST_BITS
from .placement import PLACEMENTS, Runtime
from .policy import Policy
from .range_search import SEARCHES

Reconstruction = Literal[
    "none",
    "gptq",
    "adaround",
    "adaquant",
    "brecq",
    "apq",
    "qdrop",
    "pd",
    "spq",
    "mgrq",
    "pfcr",
    "task",
    "best",
]


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
    """Of the weights, 2 to 8."""
    activation_bits: int = Field(8, ge=2, le=16)
    """Of the activations, 2 to 16."""
    first_last_bits: Literal["float", "same", 8] = 8
    """Of the layers that see the image and those that give the predictions."""
    weights: Literal["per_channel", "per_tensor"] = "per_channel"
    """A scale for each output channel of a layer's weights, or one for all of them."""
    weight_grid: Literal["asymmetric", "symmetric", "piecewise"] = "asymmetric"
    """asymmetric: grids of weights below 8 bits may reach further to one side of zero; piecewise:
    one step near zero and a coarser one beyond (PWLQ), one of the bits for the region: a baseline,
    with method: ptq and reconstruction: none, that is not exported."""
    activations: Literal["asymmetric", "symmetric"] = "asymmetric"
    """asymmetric: with a zero point; symmetric: without, and what is never below zero has unsigned
    integers, where the runtime does."""
    activation_ranges: Literal["static", "dynamic"] = "static"
    """static: scales of activations are found on the set, once; dynamic: each call takes least and
    greatest value of the tensor at hand: a baseline, with method: ptq, that is not exported."""
    softmax: Literal["uniform", "log2", "peak"] = "uniform"
    """How outputs of softmax are quantized where a product of attention takes them. uniform: as
    other activations; log2: to powers of two, 2^-round(-log2 p) (FQ-ViT; beyond the last code to
    the least of them); peak: evenly from zero to the greatest value that was seen (APQ-ViT's
    Matthew-effect Preserving Quantization). The last two are baselines that are not exported."""
    ranges: Literal[
        "mse", "minmax", "percentile", "lsq", "cosine", "mse-output", "cosine-output", "pd"
    ] = "mse"
    """How the initial scales are found; lsq: as in LSQ, with asymmetric activations as in LSQ+; and
    values beyond the ends of a grid have no gradient, as there. mse-output, cosine-output and pd
    (as PD-Quant: the KL divergence) compare the predictions with one activation quantized and the
    rest in float; scales of weights are those of mse then."""
    start: Literal["none", "cle", "bias-correction", "cle+bias-correction"] = "none"
    """What is done to the weights for free; cle: cross-layer equalisation of the float network,
    between layers with ReLU, leaky ReLU or nothing between them, where it is exact;
    bias-correction: the mean of what rounding to the nearest level adds is taken off the biases
    (gptq does this by itself)."""
    calibration_images: int = Field(64, ge=1, le=MOST_IMAGES)
    """Images of the set the initial scales are found on."""
    refine_images: int = Field(16, ge=0, le=MOST_IMAGES)
    """Images of the set on which predictions are compared: where `ranges` are found by them; and to
    move the grids that `mse` found for activations of 5 to 7 bits to where the predictions stay
    closest; 0: these stay where they are."""
    reconstruction: Reconstruction = "gptq"
    """How weights get onto their grids, before any training. none: each to the nearest level; gptq:
    each makes up for the errors of those before it, layer by layer; adaquant: weights, biases and
    scales of one layer after another are learned; adaround, brecq, apq (APQ-ViT), qdrop, pd
    (PD-Quant), spq, mgrq, task: rounding and activation scales of one block after another are
    learned, by that method's objective; pfcr: the same of parts of blocks first, then of blocks,
    then of pairs of blocks; best: ours, from gptq's integers."""
    reconstruction_iterations: int = Field(60, ge=1, le=MOST_STEPS)
    """Steps that each block is learned for, where blocks are."""
    rounding_images: int = Field(512, ge=1, le=MOST_IMAGES)
    """Images of the set that gptq and block reconstruction look at."""
    other_worlds: bool = False
    """Whether gptq, of detectors, also looks at copies of a quarter of these in other colours,
    contrast and light: for images of another world than the network was trained on, where no photos
    of it are at hand; on images of its own less is kept."""
    scope: Literal["all", "backbone"] = "all"
    """Layers that are quantized at all; with backbone, neck and heads stay in float."""
    placement: Literal["inputs", "everywhere", "qdq"] = "inputs"
    """Where activations are quantized. inputs: on the inputs of layers (OpenVINO needs no more);
    everywhere: also on their outputs (but for the predictions) and on all that is added or
    concatenated; qdq: where `runtime` needs it to compute in integers."""
    runtime: Runtime = "onnxruntime"
    """Which runtime `placement: qdq` is for."""
    overrides: dict[str, int | str] = Field({})
    """Layer name or wildcard -> float, a bit width, or w4a8; the first match wins. For example
    {"model.23.*": 8}."""
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
    def _compared(self) -> Quantization:
        if self.local_search != self.ranges and self.refine_images == 0:
            raise ValueError(f"ranges: {self.ranges} compares predictions: refine_images above 0")
        return self

    @model_validator(mode="after")
    def _corrected_once(self) -> Quantization:
        if self.corrects_biases and self.reconstruction != "none":
            raise ValueError(
                "start: bias-correction is of weights at the nearest level (gptq corrects biases "
                "by itself): reconstruction: none"
            )
        return self

    @model_validator(mode="after")
    def _dynamic(self) -> Quantization:
        if self.activation_ranges == "dynamic":
            if self.placement == "qdq":
                raise ValueError(
                    "activation_ranges: dynamic ones are in no file for a runtime: placement: "
                    "inputs or everywhere"
                )
            if self.local_search != self.ranges:
                raise ValueError(
                    f"activation_ranges: dynamic ones are not searched: ranges: {self.ranges} has "
                    "nothing to do; mse is for the weights alone"
                )
        return self

    @model_validator(mode="after")
    def _softmax_in_no_file(self) -> Quantization:
        if self.softmax != "uniform" and self.placement == "qdq":
            raise ValueError(
                f"softmax: {self.softmax} is in no file for a runtime: placement: inputs or "
                "everywhere"
            )
        return self

    @model_validator(mode="after")
    def _piecewise_alone(self) -> Quantization:
        if self.weight_grid != "piecewise":
            return self
        if self.placement == "qdq":
            raise ValueError(
                "weight_grid: piecewise is in no file for a runtime: placement: inputs or "
                "everywhere"
            )
        if self.reconstruction != "none":
            raise ValueError(
                f"weight_grid: piecewise has levels that {self.reconstruction} does not know: "
                "reconstruction: none"
            )
        tried = self.mixed.candidates if self.mixed.budget is not None else []
        widths = [parse_widths(bits) for bits in (*self.overrides.values(), *tried)]
        least = min(self.weight_bits, *(pair[0] for pair in widths if pair), LEAST_BITS)
        if least < LEAST_BITS:
            raise ValueError(
                f"weight_grid: piecewise takes weights of {LEAST_BITS} bits or more (a bit for the "
                f"sign, one for the region), not {least}"
            )
        return self

    @property
    def equalizes(self) -> bool:
        """Whether the float network is equalised before anything else."""
        return self.start in ("cle", "cle+bias-correction")

    @property
    def corrects_biases(self) -> bool:
        """Whether rounded weights have their biases corrected."""
        return self.start in ("bias-correction", "cle+bias-correction")

    @property
    def local_search(self) -> str:
        """Key of `range_search.SEARCHES`: of the scales that are found by values alone."""
        return self.ranges if self.ranges in SEARCHES else "mse"

    @model_validator(mode="after")
    def _kernels(self) -> Quantization:
        if self.placement != "qdq":
            return self

        def of(widths: Iterable[int | str]) -> list[int]:
            return [pair[1] for width in widths if (pair := parse_widths(width))]

        # Candidates of the defaults, which nobody asked for, may be narrower than a runtime's.
        bits = [self.activation_bits, *of(self.overrides.values())]
        candidates = of(self.mixed.candidates)
        most = max(*bits, *candidates, 0)
        least = min(*bits, *(candidates if self.mixed.budget is not None else ()), 99)
        kernels = PLACEMENTS[self.runtime]
        if most > kernels.most_bits:
            raise ValueError(
                f"{self.runtime} has no activations of {most} bits; {kernels.most_bits} at most"
            )
        if least < kernels.least_bits:
            raise ValueError(
                f"{self.runtime} has no activations of {least} bits; {kernels.least_bits} at least"
            )
        return self

    @property
    def rounding(self) -> Literal["gptq", "nearest"]:
        """How weights are rounded where each layer is by itself, as for mixed precision; methods
        that learn blocks from nearest integers measure so too."""
        return "nearest" if self.reconstruction == "none" else "gptq"

    def candidates(self) -> list[Widths]:
        """What `mixed.candidates` stands for, as (weight bits, activation bits)."""
        return [
            (bits, self.activation_bits) if isinstance(bits, int) else parse_widths(bits) or (8, 8)
            for bits in self.mixed.candidates
        ]

    def policy(self) -> Policy:
        """Which layers get which bits, before any budget is spent."""
        return Policy(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            first_last_bits=self.first_last_bits,
            weights=self.weights,
            weight_grid=self.weight_grid,
            activations=self.activations,
            overrides=tuple(self.overrides.items()),
            scope=self.scope,
            placement=self.placement,
            runtime=self.runtime,
            activation_ranges=self.activation_ranges,
            softmax=self.softmax,
        )

"""Runs side by side: settings and results of each, from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import UserError, shown
from ..quantization.inspection import FLOAT_BITS, list_layers, weight_bytes
from ..recipe import recorded_recipe
from ..runtime.files import user_path
from .folder import is_run, load_run, read_metrics


@dataclass(frozen=True)
class Row:
    """One run. Values that it does not record are None.

    Attributes:
        run: its folder.
        model: the float detector it was made from, as the recipe names it.
        bits: of weights and activations; "mixed" where layers differ by a budget.
        method: what was asked for: qat, ptq or auto.
        kept: which weights were kept, and why.
        images: of the set it was made on.
        quantized_share: of the multiply-accumulates, in [0, 1].
        divergence_start, divergence: from the float network's predictions, of the calibrated start
            and of what was kept (lower is closer).
        measured_on: the set that the next ones are of.
        AP_float, AP_quantized: fractions in [0, 1].
        AP_kept: their ratio.
        top1_float, top1_quantized, top1_kept: the same of classifiers.
        weight_bytes, float_weight_bytes: what the weights take at their bits, and as floats.
    """

    run: str
    model: str | None
    bits: str | None
    method: str | None
    kept: str | None
    images: int | None
    quantized_share: float | None
    divergence_start: float | None
    divergence: float | None
    measured_on: str | None
    AP_float: float | None
    AP_quantized: float | None
    AP_kept: float | None
    weight_bytes: int
    float_weight_bytes: int
    top1_float: float | None = None
    top1_quantized: float | None = None
    top1_kept: float | None = None

    @property
    def metric(self) -> str:
        """What was measured."""
        return "AP" if self.top1_quantized is None else "top-1"

    @property
    def accuracies(self) -> tuple[float | None, float | None, float | None]:
        """Of the float network and of the quantized one, and their ratio, whatever was measured."""
        if self.top1_quantized is None:
            return self.AP_float, self.AP_quantized, self.AP_kept
        return self.top1_float, self.top1_quantized, self.top1_kept

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


COLUMNS = tuple(field.name for field in fields(Row))


def compare(runs: Sequence[str | Path]) -> list[Row]:
    """A row for each finished run, in the order given.

    Raises:
        UserError: one is no run, is unfinished or damaged.

    Example:
        >>> [row.run for row in dfq.compare(["run"])]
        ['run']
    """
    if not runs:
        raise UserError("which runs? name at least one run folder")
    return [_row(user_path(run)) for run in runs]


def _row(folder: Path) -> Row:
    if not is_run(folder):
        raise UserError(f"{shown(folder)}: is no run; give a folder that dfq qat has written")
    # Also refuses what is unfinished or damaged.
    detector = load_run(folder)
    layers = list_layers(detector)
    metrics = read_metrics(folder)
    measured = metrics.get("evaluation")
    measured = measured if isinstance(measured, dict) else {}
    (before, after), top1 = (
        [number(measured.get(name), figure) for name in ("float", "quantized")]
        for figure in ("AP", "top1")
    )
    start_divergence, divergence = _divergence(metrics)
    weights = weight_bytes(layers)
    return Row(
        run=str(folder),
        model=_text(_recipe(folder).get("model")),
        bits=_bits(metrics),
        method=_text(metrics.get("method")),
        kept=_text(metrics.get("selected")),
        images=_whole(number(metrics, "images")),
        quantized_share=number(metrics, "quantized_share_of_macs"),
        divergence_start=start_divergence,
        divergence=divergence,
        measured_on=_text(measured.get("data")),
        AP_float=before,
        AP_quantized=after,
        AP_kept=_ratio(before, after),
        weight_bytes=round(weights),
        float_weight_bytes=round(
            sum(weight_bytes([row]) * FLOAT_BITS / row.weight_bits for row in layers)
        ),
        top1_float=top1[0],
        top1_quantized=top1[1],
        top1_kept=_ratio(*top1),
    )


def _ratio(before: float | None, after: float | None) -> float | None:
    return after / before if before and after is not None else None


def _recipe(folder: Path) -> dict[str, Any]:
    # As the run has it: with every value.
    try:
        return recorded_recipe(folder / "recipe.yaml").model_dump()
    except UserError as error:
        # Of several runs, the one; and what is wrong first.
        problem = error.args[0].removeprefix(f"{folder / 'recipe.yaml'}: ")
        raise UserError(
            f"{shown(folder / 'recipe.yaml')}: damaged ({problem}); restore it"
        ) from None


def _bits(metrics: dict[str, Any]) -> str | None:
    weights, activations = (
        _whole(number(metrics, key)) for key in ("weight_bits", "activation_bits")
    )
    if weights is None or activations is None:
        return None
    return f"w{weights}a{activations}{' mixed' if 'mixed' in metrics else ''}"


def _divergence(metrics: dict[str, Any]) -> tuple[float | None, float | None]:
    """Of the start, and of the weights that were kept."""
    divergences = metrics.get("teacher_divergence")
    selected = str(metrics.get("selected", ""))
    name = "start"
    if selected.startswith("qat: epoch"):
        name = "best"
    elif selected.startswith("qat: "):
        name = selected.removeprefix("qat: ").partition(" ")[0]
    return number(divergences, "start"), number(divergences, name)


def number(values: Any, key: str) -> float | None:
    """A figure of what a file of metrics holds, finite; None where there is none."""
    value = values.get(key) if isinstance(values, dict) else None
    # What is not finite, or no float holds, is no more of a figure than text.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)

"""What the template shows: every section's figures as text, charts and pictures; None where there
is nothing to show."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .._version import __version__
from ..data.statistics import Summary, summarize
from ..errors import UserError
from ..quantization.output_quantizers import count_adds_and_concats
from ..quantization.policy import Policy
from ..runs.comparison import number
from ..runs.held_out import hold_out
from ..synthesis.quality import BOUND, FIRST_BOUND, quality_of
from . import account, figures
from .cost import cost_of, cost_rows
from .formats import amount, fixed, percent, text
from .layers import LayerRow, layer_rows, too_wide
from .material import Material
from .pictures import Tile
from .table import measured_AP, side_by_side
from .tasks import PAGES, summary_of
from .verdict import rule_of, verdict_of

TOP = 20
"""Categories that are listed one by one."""

MOST_EPOCHS, MOST_LAYERS, MOST_LINES = 2_000, 1_000, 50
"""Of charts and tables, and of what a run said."""

LARGEST = 1e9
"""Values beyond are not drawn: nothing sensible is so large, and axes have their bounds."""

T = TypeVar("T")


def sections(material: Material) -> dict[str, Any]:
    """All that the template is given."""
    pictures = _Pictures(material)
    task = material.student.task
    policy = Policy.from_dict(dict(material.manifest["policy"]))
    rows = layer_rows(material.student, material.layers, policy, material.sensitivity)
    context: dict[str, Any] = {
        "title": f"{account.network_name(material)} in {_bits(material.metrics)}",
        "sentence": account.sentence(material),
        "task": PAGES[task],
        "verdict": verdict_of(material.metrics, measured_AP(material), task),
        "rule": rule_of(task),
        "comparison": side_by_side(material),
        "set": pictures.tried("the images it was made on", _set, material),
        "pairs": [group for group in pictures.groups() if group["pairs"]],
        "quality": _quality(material.metrics),
        "training": _training(material.metrics),
        "layers": _layers(material, rows),
        "cost": cost_rows(cost_of(material.layers)),
        "exports": material.exports,
        "untouched": _untouched(material, rows, policy),
        "selected": text(material.metrics.get("selected"), 400),
        "said": [text(line, 1200) for line in _list(material.metrics.get("said"))[:MOST_LINES]],
        "real": account.real_images(material),
        "commands": account.commands(material),
        "record": _record(material),
    }
    # Last: what could not be shown is known now.
    context["missing"] = [text(line, 400) for line in material.missing]
    return context


class _Pictures:
    """Pictures, which need what may be gone or broken."""

    def __init__(self, material: Material) -> None:
        self.material = material

    def tried(self, subject: str, find: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return find(*arguments)
        except UserError as error:
            self.material.missing.append(f"{subject}: {error}")
            return None

    def groups(self) -> list[dict[str, Any]]:
        """Images with what both networks say of them."""
        material = self.material
        teacher, student = material.teacher, material.student
        if teacher is None:
            return []
        page = PAGES[student.task]
        groups: list[dict[str, Any]] = []
        if material.data is not None:
            _, looked = hold_out(material.data)
            pairs = self.tried(
                "predictions on images of the set", page.pairs_on_squares,
                teacher, student, looked.data, looked.indices,
            )  # fmt: skip
            title = f"On {looked.where}" if looked.held_out else "On images it was made on"
            groups.append(
                {"title": title, "pairs": pairs, "real": account.is_made_on_real(material)}
            )
        if material.photos is not None:
            size = material.recipe.evaluation.image_size
            pairs = self.tried(
                "predictions on photos", page.pairs_on_photos,
                teacher, student, material.photos, size,
            )  # fmt: skip
            title = f"On {len(material.photos)} photos it was made without"
            groups.append({"title": title, "pairs": pairs, "real": True})
        return groups


def _bits(metrics: Mapping[str, Any]) -> str:
    weights, activations = number(metrics, "weight_bits"), number(metrics, "activation_bits")
    if weights is None or activations is None:
        return "low bits"
    return f"W{weights:.0f}A{activations:.0f}" + (" (mixed)" if "mixed" in metrics else "")


def _set(material: Material) -> dict[str, Any] | None:
    data = material.data
    page = PAGES[material.student.task]
    objects = None if data is None else page.objects(data)
    if data is None or objects is None:
        return None
    tiles: list[Tile] = page.tiles(data, material.student.names)
    return {
        "tiles": tiles,
        "real": account.is_made_on_real(material),
        "noise": account.is_noise(material),
        "summary": summary_of(page, objects),
        "categories": _categories(summarize(objects)),
        "charts": page.charts(objects) if len(objects) else [],
    }


def _categories(summary: Summary) -> dict[str, Any] | None:
    top, others, objects = summary.top(TOP)
    if not top:
        return None
    most = top[0][1]
    return {
        "rows": [(text(name, 60), count, round(100 * count / most, 2)) for name, count in top],
        "others": others,
        "objects": objects,
    }


def _quality(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    quality = quality_of({"quality": metrics.get("set_quality")})
    if quality is None:
        return None
    layers = quality.layers[:MOST_LAYERS]
    shift = [layer.shift for layer in layers]
    spread = [layer.log_variance for layer in layers]
    named = [
        ("first", quality.first),
        *((f"worst {i}", layer) for i, layer in enumerate(quality.worst(), 1)),
    ]
    return {
        "images": quality.images,
        "rows": [
            (label, text(layer.name, 80), f"{layer.shift:.2f}", f"{layer.log_variance:+.2f}")
            for label, layer in named
        ],
        "warnings": [text(line, 600) for line in quality.warnings()],
        "bounds": (FIRST_BOUND, BOUND),
        "chart": figures.quality("quality", "Layer by layer", shift, spread, BOUND)
        if len(layers) > 1 and _can_be_drawn(shift + spread)
        else None,
    }


def _training(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    history = [row for row in _list(metrics.get("history")) if isinstance(row, Mapping)]
    history = history[:MOST_EPOCHS]
    divergence = _mapping(metrics.get("teacher_divergence"))
    if not history and not divergence:
        return None
    names = dict.fromkeys(key for row in history for key in row)
    rows, charts = [], []
    for index, name in enumerate(sorted(names, key=lambda key: (key != "loss", str(key)))[:8]):
        values = [value for row in history if (value := number(row, name)) is not None]
        if not values:
            continue
        rows.append((text(name, 40), f"{values[0]:.4g}", f"{values[-1]:.4g}"))
        if len(values) > 1 and _can_be_drawn(values):
            charts.append(figures.curve(f"loss{index}", text(name, 40), values))
    return {
        "epochs": len(history),
        "rows": rows,
        "charts": charts,
        "divergence": [
            (text(name, 40), f"{value:.4g}")
            for name in divergence
            if (value := number(divergence, name)) is not None
        ],
    }


def _can_be_drawn(values: Sequence[float]) -> bool:
    """Whether no value is too large for an axis; NaN, which stands for nothing, is not."""
    return not any(abs(value) > LARGEST for value in values)


def _layers(material: Material, rows: Sequence[LayerRow]) -> dict[str, Any]:
    some = list(rows)[:MOST_LAYERS]
    charts = []
    if len(some) > 1:
        infos = [row.info for row in some]
        charts.append(
            figures.bits(
                "bits", "Bits",
                [info.weight_bits for info in infos], [info.activation_bits for info in infos],
            )
        )  # fmt: skip
        low = [row.grids[0].low if row.grids else math.nan for row in some]
        high = [row.grids[0].high if row.grids else math.nan for row in some]
        if any(map(math.isfinite, low)) and _can_be_drawn(low + high):
            charts.append(figures.ranges("ranges", "Range of each layer's input", low, high))
        millions = [info.macs / 1e6 for info in infos]
        charts.append(figures.bars("macs", "Multiplications", millions, "millions", form=".4g"))
        divergence = [math.nan if row.divergence is None else row.divergence for row in some]
        if any(map(math.isfinite, divergence)) and _can_be_drawn(divergence):
            title = "Sensitivity: divergence with this layer alone at its bits"
            charts.append(figures.bars("sensitivity", title, divergence, "divergence", form=".4g"))
    return {
        "charts": charts,
        "measured": any(row.divergence is not None for row in some),
        "more": len(rows) - len(some),
        "count": len(rows),
        "rows": [
            {
                "name": text(row.info.name, 120),
                "kind": text(row.info.kind, 20),
                "bits": row.bits,
                "grids": [
                    (
                        f"{grid.step:.3g}",
                        f"{grid.zero_point}",
                        f"{grid.low:.3g}",
                        f"{grid.high:.3g}",
                    )
                    for grid in row.grids
                ],
                "macs": amount(row.info.macs),
                "share": percent(row.share),
                "divergence": fixed(row.divergence, ".3g"),
            }
            for row in some
        ],
    }


def _untouched(material: Material, rows: Sequence[LayerRow], policy: Policy) -> dict[str, Any]:
    """What is in float or apart from the others, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.why or not row.info.quantized:
            key = (row.bits, row.why or "as the run's policy has it")
            reasons.setdefault(key, []).append(text(row.info.name, 80))
    wide = too_wide(material.student, material.layers)
    if wide and material.recipe.quantization.rounding == "gptq":
        key = ("rounded to nearest", "too many inputs for rounding that makes up for its errors")
        reasons[key] = [text(name, 80) for name in wide]
    adds_and_concats = None
    # Of networks that cannot be traced.
    with contextlib.suppress(Exception):
        adds_and_concats = count_adds_and_concats(material.student)
    return {
        "share": percent(number(material.metrics, "quantized_share_of_macs")),
        "reasons": [
            (bits, why, names[:TOP], max(0, len(names) - TOP))
            for (bits, why), names in reasons.items()
        ],
        "adds_and_concats": adds_and_concats,
        "placement": policy.placement,
        "dynamic": policy.activation_ranges == "dynamic",
        "softmax": policy.softmax,
        "piecewise": policy.weight_grid == "piecewise",
    }


def _record(material: Material) -> list[tuple[str, str]]:
    """What made the run, by name and checksum."""
    identity = _mapping(material.manifest.get("identity"))
    versions = _mapping(material.manifest.get("versions"))
    rows = [
        ("Float network", text(material.recipe.model, 200)),
        ("Its sha256", text(identity.get("checkpoint"), 80)),
        ("Family", text(material.student.family, 40)),
        ("Categories", f"{len(material.student.names)}"),
        ("Image side", f"{material.student.image_size} px"),
        ("Set", text(account.set_name(material), 200)),
    ]
    data = identity.get("data")
    if not account.is_made_on_real(material) and isinstance(data, list) and data:
        rows.append(("sha256 of its labels", text(data[0], 80)))
    rows += [
        ("sha256 of model.safetensors", text(material.manifest.get("model_sha256"), 80)),
        ("sha256 of metrics.json", text(material.manifest.get("metrics_sha256"), 80)),
        ("Seed", text(material.recipe.seed, 40)),
        ("Method asked for", text(material.metrics.get("method"), 40)),
    ]
    rows += [
        (f"{text(name, 40)} (of the run)", text(versions[name], 60))
        for name in sorted(versions)[:MOST_LINES]
    ]
    rows.append(("dfq (of this page)", __version__))
    return rows


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []

"""The layers of a run: bits, ranges, costs, and why what is in float is."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.base import Boundary, Model
from ..ptq.gptq import is_too_wide
from ..quantization.bit_widths import format_widths
from ..quantization.inspection import FLOAT_KINDS, LayerInfo
from ..quantization.layers import QUANTIZED_LAYERS, QuantMatmul
from ..quantization.policy import Policy
from ..quantization.quantizers import Quantizer
from ..runs.comparison import number


@dataclass(frozen=True)
class Grid:
    """The integers that an activation is put on.

    Attributes:
        step: between two values.
        zero_point: the integer of zero.
        low, high: least and largest value.
    """

    step: float
    zero_point: int
    low: float
    high: float


@dataclass(frozen=True)
class LayerRow:
    """One layer as the page lists it.

    Attributes:
        info: what it is and costs.
        share: of the network's MACs, in [0, 1].
        grids: of its input; of a product of two activations, of both; none in float, nor where
            each call has its own, nor of powers of two.
        why: why it is in float, or has other bits than the others; empty: as the others.
        divergence: of the predictions with this layer alone at its bits, where it was measured.
    """

    info: LayerInfo
    share: float
    grids: tuple[Grid, ...]
    why: str
    divergence: float | None

    @property
    def bits(self) -> str:
        if not self.info.quantized:
            return "float"
        return f"{self.info.weight_bits} / {self.info.activation_bits}"


def layer_rows(
    detector: Model,
    layers: Sequence[LayerInfo],
    policy: Policy,
    sensitivity: Mapping[str, Any] | None,
) -> list[LayerRow]:
    """The layers of a low-bit network, in the order they run.

    Args:
        detector: the network.
        layers: what `list_layers` says of it.
        policy: that it was made by.
        sensitivity: what `sensitivity.json` holds; None: there is none.
    """
    total = sum(info.macs for info in layers) or 1
    boundary, measured = detector.boundary_layers(), _divergences(sensitivity)
    rows = []
    for info in layers:
        module = detector.module.get_submodule(info.name)
        quantizers: tuple[Quantizer, ...] = ()
        if isinstance(module, QUANTIZED_LAYERS):
            quantizers = (module.input_quantizer,)
        elif isinstance(module, QuantMatmul):
            quantizers = (module.left_quantizer, module.right_quantizer)
        widths = format_widths((info.weight_bits, info.activation_bits))
        rows.append(
            LayerRow(
                info,
                info.macs / total,
                tuple(_grid(q) for q in quantizers if q.searched),
                _why(info, policy, boundary, detector.backbone),
                number(measured.get(info.name), widths),
            )
        )
    return rows


def too_wide(detector: Model, layers: Sequence[LayerInfo]) -> list[str]:
    """Names of the quantized layers that have too many inputs for anything but nearest rounding."""
    return [
        info.name
        for info in layers
        if isinstance(module := detector.module.get_submodule(info.name), QUANTIZED_LAYERS)
        and is_too_wide(module)
    ]


def _grid(quantizer: Quantizer) -> Grid:
    step = float(quantizer.scale.detach()[0])
    qmin, qmax = quantizer.bounds
    zero = min(max(round(float(quantizer.zero_point.detach()[0])), qmin), qmax)
    return Grid(step, zero, step * (qmin - zero), step * (qmax - zero))


def _why(info: LayerInfo, policy: Policy, boundary: Boundary, backbone: str | None) -> str:
    if info.kind in FLOAT_KINDS:
        return "dfq has no integer form of this kind of layer"
    for pattern, bits in policy.overrides:
        if fnmatch.fnmatchcase(info.name, pattern):
            return f"by name: quantization.overrides or the budget gives it {bits}"
    if policy.scope == "backbone" and not info.name.startswith(f"{backbone}."):
        return "outside of the backbone: quantization.scope is backbone"
    edge = "sees the image" if info.name in boundary.first else ""
    if info.name in boundary.last:
        edge = "gives the predictions"
    if edge and policy.first_last_bits != "same":
        return f"{edge}: quantization.first_last_bits is {policy.first_last_bits}"
    return ""


def _divergences(sensitivity: Mapping[str, Any] | None) -> dict[str, Any]:
    """Layer -> widths -> divergence, of what was measured: layers that had a choice."""
    rows = sensitivity.get("layers") if isinstance(sensitivity, Mapping) else None
    divergences = {}
    for row in rows if isinstance(rows, list) else []:
        values = row.get("divergence") if isinstance(row, Mapping) else None
        if isinstance(values, Mapping) and len(values) > 1 and isinstance(row.get("name"), str):
            divergences[row["name"]] = dict(values)
    return divergences

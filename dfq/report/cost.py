"""What a network costs, in float and at its bits, as a table of any figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..quantization.inspection import FLOAT_BITS, LayerInfo, bit_operations, weight_bytes
from ..runs.comparison import number
from .formats import amount, mebibytes

Costs = Mapping[str, Mapping[str, Any]]
"""Name of a figure -> "float" and "this", either of which may be missing. Names that end in
"bytes" are shown as such."""

_LABELS = {
    "macs": "Multiplications an image",
    "bit_operations": "Bit operations an image",
    "weight_bytes": "Weights at their bits",
}


@dataclass(frozen=True)
class CostRow:
    """One figure: of the float network, of this one, and how many times less that is."""

    label: str
    before: str
    after: str
    ratio: str


def cost_of(layers: Sequence[LayerInfo]) -> dict[str, dict[str, float]]:
    """What the layers of a network cost, see `Costs`.

    Args:
        layers: as they are quantized.
    """
    macs = sum(row.macs for row in layers)
    as_float = sum(weight_bytes([row]) * FLOAT_BITS / row.weight_bits for row in layers)
    return {
        "macs": {"float": macs, "this": macs},
        "bit_operations": {"float": FLOAT_BITS**2 * macs, "this": bit_operations(layers)},
        "weight_bytes": {"float": as_float, "this": weight_bytes(layers)},
    }


def cost_rows(costs: Costs) -> list[CostRow]:
    """The figures as they are shown; what is no number is left out."""
    rows = []
    for name, values in costs.items():
        before, after = number(values, "float"), number(values, "this")
        if before is None and after is None:
            continue
        form = mebibytes if name.endswith("bytes") else amount
        ratio = f"{before / after:.1f} ×" if before and after and before != after else "–"
        label = _LABELS.get(name, name.replace("_", " ").capitalize())
        rows.append(CostRow(label, form(before), form(after), ratio))
    return rows

"""The table of the page: the float network, this one, and others that it was measured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..runs.comparison import number
from .cost import cost_of, cost_rows
from .formats import NOTHING, fixed, mebibytes, percent, text
from .material import Compared, Material

_ACCURACIES = {
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "f1_micro": "Micro F1",
    "f1_macro": "Macro F1",
}
"""Figures of a classifier, as the page calls them."""


def _accuracies(measured: Any) -> tuple[str, ...]:
    """Which figures say how accurate a network is: those of a detector, or of a classifier."""
    return ("AP", "AP50") if number(measured, "top1") is None else tuple(_ACCURACIES)


def measured_AP(material: Material) -> tuple[float | None, float | None]:
    """Of the float network and of this one, where measured; of classifiers, top-1 accuracy."""
    measured = material.metrics.get("evaluation")
    if isinstance(measured, Mapping):
        float_figures, quantized_figures = measured.get("float"), measured.get("quantized")
        key = _accuracies(float_figures)[0]
        return number(float_figures, key), number(quantized_figures, key)
    if material.comparison is not None:
        before = [row.AP for row in material.comparison.rows if row.before]
        after = [row.AP for row in material.comparison.rows if row.this]
        return before[0] if before else None, after[0] if after else None
    return None, None


Cell = tuple[str, str]
"""A figure, and what share of the float network's it is, where that says something."""

_NOTHING: Cell = (NOTHING, "")


def side_by_side(material: Material) -> dict[str, Any]:
    """Networks as columns, figures as rows: "columns", "rows" and, of the columns, the one that is
    "this" network."""
    networks: Sequence[Compared] = ()
    if material.comparison is not None:
        networks = material.comparison.rows
    # These two first: a phone may show no more.
    networks = sorted(networks, key=lambda network: (not network.before, not network.this))
    columns = [text(network.name, 60) for network in networks] or ["Float", "This"]
    rows = _compared_rows(material, networks)

    def add(
        label: str, first: str, last: str | Cell, source: str, others: Sequence[str] = ()
    ) -> None:
        cells = [(first, ""), (last, "") if isinstance(last, str) else last]
        cells += [(figure, "") for figure in others] or [_NOTHING] * (len(columns) - 2)
        rows.append({"label": label, "cells": cells, "source": source})

    measured = material.metrics.get("evaluation")
    if isinstance(measured, Mapping):
        source = "metrics.json, evaluation"
        float_figures, quantized_figures = measured.get("float"), measured.get("quantized")
        keys = _accuracies(float_figures)
        for key in keys:
            first, last = number(float_figures, key), number(quantized_figures, key)
            share = percent(last / first) if first and last is not None else ""
            where = f" on {text(measured.get('data'), 80)}" if key == keys[0] else ""
            add(f"{_ACCURACIES.get(key, key)}{where}", fixed(first), (fixed(last), share), source)
    closeness = _mapping(material.metrics.get("closeness"))
    for key in ("synthetic", "photos"):
        source = f"metrics.json, closeness.{key}"
        values = _mapping(closeness.get(key))
        objects, kept, above = (number(values, k) for k in ("objects", "kept", "kept_above"))
        where = f"{number(values, 'images') or 0:.0f} {_where(key, values)}"
        for label, count in (
            (f"Detections kept on {where}", kept),
            ("… with a score above 0.3 again", above),
        ):
            if objects is not None and count is not None:
                share = percent(count / objects) if objects else ""
                add(label, f"{objects:.0f}", (f"{count:.0f}", share), source)
        images, same = number(values, "images"), number(values, "same")
        if images and same is not None:
            label = f"Same category likeliest on {where}"
            add(label, f"{images:.0f}", (f"{same:.0f}", percent(same / images)), source)
        if number(values, "AP") is not None:
            add("Agreement AP on them", fixed(1.0), fixed(number(values, "AP")), source)
    costs = [
        {line.label: line.after for line in cost_rows(network.cost)} for network in networks[2:]
    ]
    for line in cost_rows(cost_of(material.layers)):
        if line.before != line.after:
            others = [cost.get(line.label, NOTHING) for cost in costs]
            add(line.label, line.before, line.after, "dfq inspect", others)
    for export in material.exports:
        if export.size_bytes is not None:
            label = f"Size on disk, {text(export.file or export.source, 60)}"
            where = f"exports/{text(export.source, 60)}"
            add(label, NOTHING, mebibytes(export.size_bytes), where)
    return {"columns": columns, "this": 1, "rows": rows}


def _compared_rows(material: Material, networks: Sequence[Compared]) -> list[dict[str, Any]]:
    if material.comparison is None or not networks:
        return []
    rows = []
    for label, values in (
        (f"AP on {text(material.comparison.data, 80)}", [network.AP for network in networks]),
        ("AP50", [network.AP50 for network in networks]),
    ):
        shares = ("", *(percent(value / values[0]) if values[0] else "" for value in values[1:]))
        cells = list(zip(map(fixed, values), shares, strict=True))
        rows.append({"label": label, "cells": cells, "source": material.comparison.source})
    return rows


def _where(key: str, values: Mapping[str, Any]) -> str:
    if key == "photos":
        return "photos it was made without"
    if values.get("held_out") is True:
        return "held-out synthetic images"
    return "of the images it was made on"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}

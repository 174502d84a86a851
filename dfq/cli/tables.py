"""Tables of the command line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import shown
from ..evaluation.agreement import sentence
from ..quantization.bit_widths import format_widths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..evaluation.agreement import Agreement
    from ..evaluation.classification import ClassificationMetrics
    from ..export.cost import Cost, Figures
    from ..export.targets import Target
    from ..mixed_precision.search import Sensitivity
    from ..quantization.inspection import Inspection
    from ..runs.comparison import Row


def _console() -> Console:
    # Wide enough for every column when the output is a file or a pipe.
    return Console(width=None if sys.stdout.isatty() else 140)


def print_layers(inspection: Inspection) -> None:
    """One row a layer, and the sums."""
    title = f"{shown(inspection.source)} ({inspection.family}, {inspection.image_size} px)"
    table = Table(title=escape(title))
    for column in ("layer", "kind", "weight", "output", "MACs (M)", "weight bits", "act. bits"):
        table.add_column(column, justify="left" if column in ("layer", "kind") else "right")
    for layer in inspection.layers:
        bits = [str(b) if b < 32 else "float" for b in (layer.weight_bits, layer.activation_bits)]
        shapes = ["x".join(map(str, s)) for s in (layer.weight_shape, layer.output_shape)]
        words = (escape(shown(text)) for text in (layer.name, layer.kind))
        table.add_row(*words, *shapes, f"{layer.macs / 1e6:.2f}", *bits)
    console = _console()
    console.print(table)
    total = sum(layer.macs for layer in inspection.layers)
    quantized = sum(layer.quantized for layer in inspection.layers)
    joined, adds_and_concats = inspection.adds_and_concats
    names = ", ".join(shown(name, limit=60) for name in inspection.names)
    console.print(
        f"{quantized} of {len(inspection.layers)} layers quantized: "
        f"{inspection.quantized_share:.1%} of {total / 1e6:.1f} M MACs",
        f"sums and concatenations quantized: {joined} of {adds_and_concats}",
        f"{len(inspection.names)} categories: {names}",
        sep="\n",
        highlight=False,
        markup=False,
    )


def print_cost(cost: Cost) -> None:
    """One row a layer, and the whole beside the same network in float."""
    title = f"{shown(cost.source)} ({cost.family}, {cost.image_size} px, one image)"
    table = Table(title=escape(title))
    sizes = ("disk (KiB)", "memory (KiB)", "act. (KiB)")
    figures = ("MACs (M)", "bit ops (M)", *sizes, "energy (mJ)")
    for column in ("layer", "kind", "bits", *figures):
        table.add_column(column, justify="right" if column in figures else "left")
    for layer in cost.layers:
        widths = (layer.weight_bits, layer.activation_bits)
        bits = format_widths(widths) if max(widths) < 32 else "float"
        words = (escape(shown(text)) for text in (layer.name, layer.kind))
        table.add_row(*words, bits, *_figure_cells(layer.figures))
    console = _console()
    console.print(table)
    whole = Table(title="all layers")
    for column in ("", *figures):
        whole.add_column(column, justify="right" if column else "left")
    whole.add_row("network", *_figure_cells(cost.total))
    whole.add_row("as float", *_figure_cells(cost.as_float))
    ratios = cost.total.ratio(cost.as_float).values()
    where = shown(cost.peak_at) or "the network's own code"
    whole.add_row("ratio", *("" if ratio is None else f"{ratio:.1%}" for ratio in ratios))
    console.print(whole)
    console.print(
        "disk, memory: of the weights, at their bits and at a byte each up to 8 bits",
        f"act.: of the activations that are there at once, most of all in {where}",
        "energy: an estimate from operations and memory accesses (Horowitz, ISSCC 2014, 45 nm)",
        sep="\n",
        highlight=False,
        markup=False,
    )


def _figure_cells(figures: Figures) -> list[str]:
    sizes = (figures.disk_bytes, figures.memory_bytes, figures.activation_bytes)
    return [
        f"{figures.macs / 1e6:.2f}",
        f"{figures.bit_operations / 1e6:.1f}",
        *(f"{size / 1024:.1f}" for size in sizes),
        f"{figures.energy_joules * 1e3:.4g}",
    ]


def print_sensitivity(sensitivity: Sensitivity, model: str) -> None:
    """One row a layer: its divergence at each width it may have, and the one it is given."""
    title = f"{shown(model)}: divergence of the predictions, one layer quantized at a time"
    table = Table(title=escape(title))
    free = [row for row in sensitivity.layers if row.free]
    widths = free[0].widths
    table.add_column("layer")
    for column in ("MACs (M)", "weights", *map(format_widths, widths), "chosen"):
        table.add_column(column, justify="right")
    for row in sensitivity.layers:
        values = [f"{value:.4g}" for value in row.divergence] if row.free else ["" for _ in widths]
        layer_widths = sensitivity.widths(row)
        if layer_widths is None:
            width_cell = "" if row.free else "float"
        else:
            width_cell = format_widths(layer_widths) + ("" if row.free else " (fixed)")
        name = escape(shown(row.name))
        table.add_row(name, f"{row.macs / 1e6:.2f}", str(row.weights), *values, width_cell)
    console = _console()
    console.print(table)
    line = (
        f"{len(free)} of {len(sensitivity.layers)} layers measured on {sensitivity.images} images"
    )
    if sensitivity.budget is not None:
        words = sensitivity.kind.replace("_", " ")
        line += (
            f"; {sensitivity.spent:.4g} of {sensitivity.budget:.4g} {words} spent, "
            f"sum of divergences {sensitivity.divergence:.4g}"
        )
    console.print(line, highlight=False)


def print_comparison(rows: Sequence[Row]) -> None:
    """One row a run."""
    table = Table(title="runs")
    for column in ("run", "bits", "method", "kept"):
        table.add_column(column)
    metric = " or ".join(sorted({row.metric for row in rows}))
    for column in (
        "images", f"{metric} float", metric, f"{metric} kept", "divergence", "of start",
        "MACs quantized", "weights",
    ):  # fmt: skip
        table.add_column(column, justify="right")

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        ratio = None
        if row.divergence is not None and row.divergence_start:
            ratio = row.divergence / row.divergence_start
        table.add_row(
            escape(shown(row.run)),
            row.bits or "",
            escape(shown(row.method or "")),
            escape(shown((row.kept or "").partition(":")[0])),
            cell(row.images, "d"),
            cell(row.accuracies[0], ".4f"),
            cell(row.accuracies[1], ".4f"),
            cell(row.accuracies[2], ".1%"),
            cell(row.divergence, ".4g"),
            cell(ratio, ".1%"),
            cell(row.quantized_share, ".1%"),
            f"{row.weight_bytes / 2**20:.2f} of {row.float_weight_bytes / 2**20:.2f} MiB",
        )
    _console().print(table)


def print_metrics(metrics: dict[str, Any]) -> None:
    """What `Metrics.to_dict` holds."""
    masks = metrics["masks"]
    if masks is not None:
        click.echo(f"{'':<10} boxes   masks")
    for key in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100"):
        values = [figures[key] for figures in (metrics, masks) if figures is not None]
        cells = ("none  " if value is None else format(value, ".4f") for value in values)
        click.echo(f"{key:<10} {'  '.join(cells)}".rstrip())
    for name, figures in (("AP", metrics), ("mask AP", masks)):
        low, high = (figures or {}).get("AP_interval") or (None, None)
        if low is not None:
            click.echo(f"{name} between {low:.4f} and {high:.4f} (95 %, over the draw of images)")
    split = f", split {metrics['split']}" if metrics["split"] else ""
    click.echo(f"{metrics['images']} images at {metrics['image_size']} px{split}")
    if metrics["dropped"]:
        click.echo(metrics["dropped_boxes"])
    if masks is not None and masks["images"] < metrics["images"]:
        click.echo(f"masks on {masks['images']} of them, whose objects all have an outline")
    if metrics["missing_categories"]:
        click.echo(
            f"not measured, unknown to the model: {', '.join(metrics['missing_categories'])}"
        )


def print_classification(metrics: ClassificationMetrics) -> None:
    """How often a classifier is right."""
    for key, value in (
        ("top-1", metrics.top1),
        ("top-5", metrics.top5),
        ("micro F1", metrics.f1_micro),
        ("macro F1", metrics.f1_macro),
    ):
        click.echo(f"{key:<10} {value:.4f}")
    if metrics.top1_interval is not None:
        low, high = metrics.top1_interval
        click.echo(f"top-1 between {low:.4f} and {high:.4f} (95 %, over the draw of images)")
    click.echo(f"{metrics.images} images at {metrics.image_size} px")
    if metrics.by_position:
        click.echo("categories matched by position: the set and the model share no name")
    if metrics.passed_over:
        click.echo(f"{metrics.passed_over} files left out, whose names do not end as images' do")
    if metrics.missing_categories:
        names = ", ".join(shown(name, limit=60) for name in metrics.missing_categories)
        click.echo(f"not measured, unknown to the model: {names}")


def print_agreement(agreement: Agreement) -> None:
    """AP against a float network's detections, and how many of these are kept."""
    for key, value in (("AP", agreement.AP), ("AP50", agreement.AP50)):
        click.echo(f"{key:<10} {value:.4f}")
    if agreement.AP_interval is not None:
        low, high = agreement.AP_interval
        click.echo(f"AP between {low:.4f} and {high:.4f} (95 %, over the draw of images)")
    click.echo(f"{agreement.images} images at {agreement.image_size} px; no label was used")
    click.echo(sentence(agreement, "these images"))


def print_targets(targets: Sequence[Target]) -> None:
    """One row a target, and what there is to know of each."""
    table = Table(title="targets")
    for column in ("target", "for", "bits", "file", "checked here", "notes"):
        table.add_column(column, overflow="fold")
    for target in targets:
        if target.calibration is not None:
            form, checked = (
                f"{target.format}, float, and a calibration set",
                "no: its compiler runs",
            )
        else:
            form = target.format
            checked = "run" if target.verify == "run" else "structure alone"
        words = (target.name, target.title, target.precision, form, checked)
        table.add_row(*map(escape, words), escape("\n".join(target.notes)))
    _console().print(table)

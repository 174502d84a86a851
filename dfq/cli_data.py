"""`dfq data`: look at a calibration set, check it, hand it to other tools."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_common import check_output, mendable
from .errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from .dataset.summary import Summary

TOP = 20
"""Categories, and numbers of objects, that are listed one by one."""

_BAR = 40
"""Characters of the longest bar."""


@click.group()
def data() -> None:
    """Look at a calibration set, check it, export it."""


@data.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--grid", type=click.Path(path_type=Path), help="Write a PNG of its first images.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the figures here."
)
@mendable
def show(folder: Path, grid: Path | None, json_file: Path | None) -> None:
    """Say what is in the set in DIR."""
    from rich.console import Console

    from .dataset.calibration import CalibrationSet, write_json
    from .dataset.preview import write_preview
    from .dataset.summary import Objects, summarize

    check_output(grid, "--grid")
    check_output(json_file)
    if grid is not None and grid.suffix.lower() != ".png":
        raise UserError(f"--grid {grid}: is written as PNG; end its name in .png")
    found = CalibrationSet.open(folder)
    summary = summarize(Objects.of(found))
    # Wide enough for every column when the output is a file or a pipe.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for table in _tables(summary, str(folder)):
        console.print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, summary.to_dict())
    if grid is not None:
        grid.parent.mkdir(parents=True, exist_ok=True)
        write_preview(found, grid)


@data.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@mendable
def verify(folder: Path) -> None:
    """Check the set in DIR against what it was when it was made."""
    from .dataset.calibration import CalibrationSet

    found = CalibrationSet.open(folder)
    try:
        problems = found.verify()
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder / 'manifest.json'}: not as dfq wrote it; make the set again"
        ) from None
    if problems:
        raise UserError("\n".join(problems))
    objects = sum(len(label) for label in found.labels)
    click.echo(f"ok: {len(found)} images, {objects} objects")


@data.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "layout",
    type=click.Choice(["yolo"]),
    default="yolo",
    show_default=True,
    help="yolo: as Ultralytics reads it (yolo val data=OUT/data.yaml).",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@mendable
def export(folder: Path, layout: str, out: Path) -> None:
    """Write the set in DIR in the layout of another tool."""
    from .dataset.calibration import CalibrationSet
    from .dataset.export import export_yolo

    exporters = {"yolo": export_yolo}
    found = CalibrationSet.open(folder)
    click.echo(f"{len(found)} images: {exporters[layout](found, out)}")


def _tables(summary: Summary, title: str) -> list[Table]:
    tables = [_overview(summary, title)]
    if summary.objects:
        tables.append(_quantiles(summary))
    per_image = [(str(n), images) for n, images in summary.per_image.items() if n <= TOP]
    crowded = sum(images for n, images in summary.per_image.items() if n > TOP)
    if crowded:
        per_image.append((f"more than {TOP}", crowded))
    tables.append(_histogram("objects in an image", "images", per_image))
    top, others, objects = summary.top(TOP)
    if top:
        rest = [(f"({others} others)", objects)] if others else []
        tables.append(_histogram("category", "objects", [*top, *rest]))
    return tables


def _overview(summary: Summary, title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    width, height, count = summary.sizes[0]
    size = f"{width} x {height}"
    if len(summary.sizes) > 1:
        size += f" ({count} of {summary.images}; {len(summary.sizes)} sizes)"
    rows = {
        "images": str(summary.images),
        "pixels": size,
        "objects": str(summary.objects),
        "objects an image": f"{summary.objects / summary.images:.2f}",
        "images without objects": str(summary.per_image.get(0, 0)),
        "categories that occur": str(len(summary.categories)),
        "small (under 32 x 32 px)": str(summary.by_size["small"]),
        "medium": str(summary.by_size["medium"]),
        "large (over 96 x 96 px)": str(summary.by_size["large"]),
    }
    if summary.mean_score is not None:
        rows["teacher's score, mean"] = f"{summary.mean_score:.3f}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _quantiles(summary: Summary) -> Table:
    from rich.table import Table

    from .dataset.summary import QUANTILES

    table = Table("quantile")
    for share in QUANTILES:
        table.add_column(f"{share:.0%}", justify="right")
    for name, values, form in (
        ("box side (root of the area), px", summary.side, ".1f"),
        ("box area, share of the image", summary.area, ".2%"),
        ("teacher's score", summary.score, ".3f"),
    ):
        if values is not None:
            table.add_row(name, *(format(value, form) for value in values))
    return table


def _histogram(of: str, counted: str, rows: list[tuple[str, int]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column(of)
    table.add_column(counted, justify="right")
    table.add_column("share", justify="right")
    table.add_column(no_wrap=True)
    total, most = sum(count for _, count in rows), max(count for _, count in rows)
    for name, count in rows:
        bar = "#" * max(1, round(_BAR * count / most)) if count else ""
        table.add_row(escape(name), str(count), f"{count / total:.1%}", bar)
    return table

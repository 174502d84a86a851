"""`dfq data`: look at a calibration set, check it, hand it to other tools."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UserError, shown
from ..runtime.files import require_apart, require_not_read, user_path
from .options import (
    FILE,
    PATH,
    output_file,
    output_folder,
    report_user_errors,
    tell_quality,
    write_json_output,
    write_output,
)

if TYPE_CHECKING:
    from rich.table import Table

    from ..data.calibration_set import CalibrationSet
    from ..data.class_set import ClassSet
    from ..data.image_set import ImageSet
    from ..data.statistics import Summary

TOP = 20
"""Categories, and numbers of objects, that are listed one by one."""

_BAR = 40
"""Characters of the longest bar."""


@click.group(short_help="Look at a set; check or export a calibration set.")
def data() -> None:
    """Look at a set, check and export a calibration set.

    A calibration set is the folder that dfq synthesize writes.
    """


@data.command(short_help="Say what is in a SET, or in a folder of photos.")
@click.argument("source", metavar="SET")
@click.option("--grid", type=FILE, help="Write a PNG of its first images.")
@click.option("--json", "json_file", type=FILE, help="Write the figures here.")
@report_user_errors
def show(source: str, grid: str | Path | None, json_file: str | Path | None) -> None:
    """Say what is in a SET: a calibration set, a real one, or a folder of photos."""
    from rich.console import Console

    from ..data.calibration_set import CalibrationSet
    from ..data.preview import draw_preview
    from ..data.statistics import Objects, open_any, summarize

    # A picture in the folder of a set may be an image of it: that shows when it is opened.
    grid = output_file(grid, "grid")
    json_file = output_file(json_file, inputs=(source,))
    require_apart(("grid", grid), ("json", json_file))
    if grid is not None and grid.suffix.lower() != ".png":
        raise UserError(f"--grid {grid}: is written as PNG; end its name in .png")
    images = open_any(source)
    _require_apart_from_set(grid, "grid", source, images)
    _require_apart_from_set(json_file, "json", source, images)
    summary = summarize(Objects.of(images))
    # Wide enough for every column when the output is a file or a pipe.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for table in _tables(summary, source):
        console.print(table)
    if summary.remark:
        click.echo(summary.remark)
    figures = summary.to_dict()
    if isinstance(images, CalibrationSet):
        figures["quality"] = tell_quality(images)
    write_json_output(json_file, figures)
    if grid is not None:
        write_output(grid, draw_preview(images), "grid")


def _require_apart_from_set(
    path: Path | None, name: str, source: str, images: CalibrationSet | ImageSet | ClassSet
) -> None:
    """Refuse an output that is a file of the set, or would become one."""
    from ..data.calibration_set import CalibrationSet
    from ..data.class_set import ClassSet

    if path is None:
        return
    root = user_path(source)
    if isinstance(images, ClassSet):
        require_not_read(path, name, [root, *(root / file for file, _ in images.files)])
        if name == "grid" and path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"--grid {path}: would be an image of {root}; write it elsewhere")
        return
    if isinstance(images, CalibrationSet):
        require_not_read(path, name, [root / file for file in images.files])
        return
    require_not_read(path, name, [root, *(item.path for item in images.items)])
    if not images.labelled and name == "grid" and path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--grid {path}: would be one of the photos in {root}; write it elsewhere")


@data.command()
@click.argument("folder", metavar="DIR", type=PATH)
@report_user_errors
def verify(folder: Path) -> None:
    """Check the set in DIR against what it was when it was made."""
    from ..data.calibration_set import CalibrationSet

    calibration_set = CalibrationSet.open(user_path(folder))
    problems = calibration_set.verify()
    if problems:
        raise UserError(*problems)
    objects = sum(len(label) for label in calibration_set.labels)
    click.echo(f"ok: {len(calibration_set)} images, {objects} objects")


@data.command(short_help="Write a SET as the calibration set of another tool.")
@click.argument("source", metavar="SET")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["yolo"]),
    show_default="yolo",
    help="yolo: as Ultralytics reads it (yolo val data=OUT/data.yaml).",
)
@click.option(
    "--for",
    "tool",
    metavar="TOOL",
    show_default="none, but a --format",
    help="The calibration set of ultralytics, onnxruntime, openvino, nncf, ai-edge-quantizer, mct, "
    "modelopt, rknn or hailo; SET may be a folder of photos.",
)
@click.option(
    "--image-size",
    type=int,
    show_default="that of a calibration set",
    help="With --for: side of the network's input, to which real images are letterboxed.",
)
@click.option("--out", type=PATH, required=True, help="A new folder.")
@report_user_errors
def export(
    source: str, layout: str | None, tool: str | None, image_size: int | None, out: Path
) -> None:
    """Write a SET in the layout of another tool.

    With --for, as what this tool calibrates with when it quantizes, and says how to go on.
    """
    out = output_folder(out, link=False) or out
    if tool is None:
        from ..data.calibration_set import CalibrationSet
        from ..data.export_layouts import export_yolo

        if image_size is not None:
            raise UserError("--image-size: is for --for; name the tool, or leave it out")
        calibration_set = CalibrationSet.open(user_path(source))
        click.echo(f"{len(calibration_set)} images: {export_yolo(calibration_set, out)}")
        return
    from ..export.calibration_files import export_for

    if layout is not None:
        raise UserError("--format and --for contradict: leave one out")
    written, images, command = export_for(tool, source, out, image_size)
    click.echo(f"{images} images: {written}\nnext: {command}")


def _tables(summary: Summary, title: str) -> list[Table]:
    tables = [_overview(summary, title)]
    if not summary.labelled:
        return tables
    counted = "images" if summary.whole_images else "objects"
    if summary.objects and not (summary.whole_images and summary.score is None):
        tables.append(_quantiles(summary))
    if summary.whole_images:
        return [*tables, *_categories(summary, counted)]
    per_image = [(str(n), images) for n, images in summary.per_image.items() if n <= TOP]
    crowded = sum(images for n, images in summary.per_image.items() if n > TOP)
    if crowded:
        per_image.append((f"more than {TOP}", crowded))
    tables.append(_histogram("objects in an image", "images", per_image))
    return [*tables, *_categories(summary, counted)]


def _categories(summary: Summary, counted: str) -> list[Table]:
    top, others, objects = summary.top(TOP)
    if not top:
        return []
    rest = [(f"({others} others)", objects)] if others else []
    return [_histogram("category", counted, [*top, *rest])]


def _overview(summary: Summary, title: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(shown(title)), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    width, height, count = summary.sizes[0]
    size = f"{width} x {height}"
    if len(summary.sizes) > 1:
        size += f" ({count} of {summary.images}; {len(summary.sizes)} sizes)"
    rows = {
        "images": str(summary.images),
        "pixels": size,
        "labels": "yes" if summary.labelled else "none: photos only",
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
    if summary.split is not None:
        rows["split"] = shown(summary.split)
    if not summary.labelled:
        rows = {name: rows[name] for name in ("images", "pixels", "labels")}
    elif summary.whole_images:
        rows["labels"] = "a category an image"
        absent = ("object", "small", "medium", "large", "images without")
        rows = {name: value for name, value in rows.items() if not name.startswith(absent)}
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _quantiles(summary: Summary) -> Table:
    from rich.table import Table

    from ..data.statistics import QUANTILES

    table = Table("quantile")
    for share in QUANTILES:
        table.add_column(f"{share:.0%}", justify="right")
    sides = None if summary.whole_images else summary.side
    for name, values, form in (
        ("box side (root of the area), px", sides, ".1f"),
        ("box area, share of the image", sides and summary.area, ".2%"),
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
        table.add_row(escape(shown(name)), str(count), f"{count / total:.1%}", bar)
    return table

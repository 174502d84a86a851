"""`dfq compare`."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runtime.files import require_apart
from .options import FILE, output_file, report_user_errors, write_json_output, write_output

if TYPE_CHECKING:
    from ..runs.comparison import Row


@click.command(short_help="Put runs side by side: bits, method, accuracy, divergence, size.")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--csv", "csv_file", type=FILE, help="Write the table here.")
@click.option("--json", "json_file", type=FILE, help="Write the rows here.")
@report_user_errors
def compare(
    runs: tuple[str, ...], csv_file: str | Path | None, json_file: str | Path | None
) -> None:
    """Put finished runs side by side: bits, method, accuracy, divergence, size.

    RUN... are folders that dfq qat has written. AP, or top-1 of classifiers, is what the runs
    measured themselves (evaluation.data of the recipe).
    """
    from ..runs.comparison import COLUMNS
    from ..runs.comparison import compare as verb
    from .tables import print_comparison

    csv_file = output_file(csv_file, "csv", runs)
    json_file = output_file(json_file, "json", runs)
    require_apart(("csv", csv_file), ("json", json_file))
    rows = verb(runs)
    print_comparison(rows)
    if not _are_comparable(rows):
        click.echo("measured on different sets: these accuracies do not compare")
    write_json_output(json_file, [row.to_dict() for row in rows])
    if csv_file is not None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(row.to_dict() for row in rows)
        write_output(csv_file, text.getvalue().encode(), "csv")


def _are_comparable(rows: list[Row]) -> bool:
    return len({row.measured_on for row in rows if row.accuracies[1] is not None}) < 2

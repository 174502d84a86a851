"""The tables of the ICCV 2025 paper (arXiv 2507.16782), and one of what each step of ours gives.

    python -m benchmarks.paper.tables --model yolov5n.pt --real coco-train --val coco-val \\
      --out paper --tables methods,stages --images 256 --iterations 500 --epochs 20 --size 320

Of every row: AP, AP50 and AP50 by VOC's rule, F1 at its best threshold, and how far the low-bit
network's predictions are from the float one's, on labelled images that nothing was made from. Each
is the mean over the seeds; behind AP stands the 95 % interval of the mean (Student's t).

Without --images, --iterations and --epochs the protocol is the paper's, which takes weeks on a CPU.
Sets and figures stay in the output folder, figures in results.jsonl as soon as they are there:
delete that file to measure another version of dfq on the same sets. Prints Markdown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import click
import torch
from scipy.stats import t as student_t

from benchmarks.common import benchmark, header, line, names
from benchmarks.paper.conditions import Conditions, bits, command, numbers, with_conditions
from benchmarks.paper.definitions import Table, all_tables
from benchmarks.paper.engine import Bench, Figures

SIZES = "64,128,256,512,1024"
MOST_EPOCHS = 6
"""Columns of the table by epoch."""


def mean(cells: Sequence[Figures], key: str) -> float | None:
    """Over the seeds; None where one of them is undefined."""
    values = [cell[key] for cell in cells]
    return None if None in values else statistics.fmean(values)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of values that are drawn alike; None of fewer than two."""
    if len(values) < 2:
        return None
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    middle = statistics.fmean(values)
    return middle - half, middle + half


def figure(value: float | None, form: str = ".3f") -> str:
    """As it stands in a table."""
    return "–" if value is None else format(value, form)


def with_interval(cells: Sequence[Figures], key: str) -> str:
    """Mean, and its interval where there is one."""
    middle = mean(cells, key)
    between = None if middle is None else interval([cell[key] for cell in cells])
    told = "" if between is None else f" ({between[0]:.3f} to {between[1]:.3f})"
    return f"{figure(middle)}{told}"


COLUMNS = ("method", "bits", "AP:", "kept:", "AP50:", "AP50, VOC:", "F1:", "divergence:")


def figures_line(title: str, width: str, cells: Sequence[Figures], reference: Figures) -> str:
    """A row of a table of figures."""
    precision = mean(cells, "AP")
    kept = precision is not None and reference["AP"] and precision / reference["AP"]
    return line(
        title,
        width,
        with_interval(cells, "AP"),
        f"{kept:.1%}" if kept else "–",
        *(figure(mean(cells, key)) for key in ("AP50", "AP50_voc", "F1")),
        figure(mean(cells, "divergence"), ".2f"),
    )


def some_epochs(epochs: int) -> list[int]:
    """Epochs that have a column: the first, the last, and some between."""
    count = min(MOST_EPOCHS, epochs)
    spread = [1 + round(i * (epochs - 1) / max(1, count - 1)) for i in range(count)]
    return sorted({*spread, epochs})


def epochs_line(title: str, width: str, cells: Sequence[Figures], shown: Sequence[int]) -> str:
    """A row of the table by epoch: AP, mean over the seeds."""
    values = []
    for epoch in shown:
        reached = [cell["by_epoch"][epoch - 1] for cell in cells if epoch <= len(cell["by_epoch"])]
        values.append(figure(statistics.fmean(reached)) if reached else "–")
    return line(title, width, len(cells[0]["by_epoch"]), *values)


def print_table(bench: Bench, table: Table, widths: Sequence[str], seeds: Sequence[int]) -> None:
    """Make what is missing, and print a line as soon as its figures are there; those by epoch
    together, for their columns go by the longest training."""
    click.echo(f"\n## {table.title}\n")
    if table.by_epoch:
        rows = list(_rows(bench, table, widths, seeds))
        shown = some_epochs(max(len(cells[0]["by_epoch"]) for _, _, cells in rows))
        click.echo(header("method", "bits", "epochs:", *(f"after {epoch}:" for epoch in shown)))
        for title, width, cells in rows:
            click.echo(epochs_line(title, width, cells, shown))
    else:
        reference = bench.reference()
        click.echo(header(*COLUMNS))
        click.echo(figures_line("float", "", [reference], reference))
        for title, width, cells in _rows(bench, table, widths, seeds):
            click.echo(figures_line(title, width, cells, reference))
    if table.note:
        click.echo(f"\n{table.note}")


def _rows(
    bench: Bench, table: Table, widths: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, str, list[Figures]]]:
    for width in widths:
        for row in table.rows.values():
            cells = [bench.cell(row, width, seed) for seed in seeds]
            yield bench.title(row), width.upper(), cells


@benchmark(__doc__)
@with_conditions
@click.option("--tables", default=",".join(all_tables([])), show_default=True, help="By commas.")
@click.option("--widths", help="For all tables, as w8a8,w4a8; by default each table's own.")
@click.option("--rows", default="", help="Only these rows, by the names in definitions.py.")
@click.option("--sizes", default=SIZES, show_default=True, help="Images of the sets of that table.")
def main(
    conditions: Conditions,
    seeds: tuple[int, ...],
    threads: int,
    tables: str,
    widths: str | None,
    rows: str,
    sizes: str,
) -> None:
    torch.set_num_threads(threads)
    known = all_tables(numbers(sizes, "--sizes"))
    chosen = [known[name] for name in names(tables, known, "--tables")]
    asked = None if widths is None else widths.split(",")
    for width in asked or ():
        bits(width)
    names(rows, {name for table in chosen for name in table.rows}, "--rows")
    bench = Bench(conditions)
    plans = [
        (table.only(rows.split(",")) if rows else table, asked or table.widths) for table in chosen
    ]
    # A mistake shows before anything is made.
    for table, asked_for in plans:
        for row in table.rows.values():
            bench.name(row, asked_for[0], seeds[0])
    click.echo(f"{conditions.describe(seeds, len(bench.val))}\n")
    click.echo(f"    {command('benchmarks.paper.tables')}")
    for table, asked_for in plans:
        print_table(bench, table, asked_for, seeds)


if __name__ == "__main__":
    main()

"""What several benchmarks share: options, timing in turns, Markdown tables, files of results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from dfq.cli.options import report_user_errors

Row = dict[str, Any]

model_option = click.option(
    "--model", required=True, help="The float detector: a file or a published name."
)
out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of all that is made."
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Changes every recipe."
)
threads_option = click.option(
    "--threads", default=1, show_default=True, help="CPU threads of PyTorch."
)


def benchmark(text: str | None) -> Callable[[Callable[..., Any]], click.Command]:
    """A command that prints a mistake of the user as one line and exits with code 2.

    Args:
        text: its help, a module's docstring; indented lines stay as they are.
    """
    paragraphs = [
        f"\b\n{paragraph}" if paragraph.startswith("    ") else paragraph
        for paragraph in (text or "").split("\n\n")
    ]

    def decorate(function: Callable[..., Any]) -> click.Command:
        return click.command(help="\n\n".join(paragraphs))(report_user_errors(function))

    return decorate


def names(text: str, known: Collection[str], option: str) -> list[str]:
    """The names in a list by commas; none for an empty text.

    Raises:
        click.UsageError: one of them is not known.
    """
    found = [name for name in text.split(",") if name]
    for name in found:
        if name not in known:
            raise click.UsageError(f"{option} {name}: choose from {', '.join(known)}")
    return found


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """`NAME=VALUE` each, as a table.

    Raises:
        click.UsageError: one of them is not written so, or a name is there twice.
    """
    found: dict[str, str] = {}
    for entry in values:
        name, equals, value = entry.partition("=")
        if not (name and equals and value) or name in found:
            raise click.UsageError(f"{option} {entry}: write NAME=VALUE, each NAME once")
        found[name] = value
    return found


def header(*columns: str) -> str:
    """The first two lines of a Markdown table. Columns whose title ends in a colon are numbers,
    aligned to the right."""
    titles = [column.removesuffix(":") for column in columns]
    rules = ["---:" if column.endswith(":") else "---" for column in columns]
    return f"{line(*titles)}\n{line(*rules)}"


def line(*cells: object) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def synchronize(device: str | torch.device) -> None:
    """Wait for what was started on a device; a CPU has done it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm: int = 1,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time calls in turns within one process, so that a busy machine slows all alike.

    Args:
        runs: what to time, by name.
        rounds: measured calls of each.
        warm: calls of each before, which do not count.
        device: that the calls compute on.
        clock: seconds; `time.process_time` leaves out what other processes take.

    Returns:
        Seconds of each call, `rounds` by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm + rounds):
        for name, run in runs.items():
            synchronize(device)
            start = clock()
            run()
            synchronize(device)
            if number >= warm:
                times[name].append(clock() - start)
    return times


def results(path: Path) -> Iterator[Row]:
    """The rows of a file of results, a JSON object a line; none if there is no such file. A last
    line that was cut short when a benchmark was stopped is left out."""
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue

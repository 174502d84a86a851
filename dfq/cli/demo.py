"""`dfq demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .options import (
    PATH,
    output_folder,
    report_user_errors,
)


@click.command(short_help="Deploy the small detector that comes with dfq, in minutes.")
@click.option(
    "--out",
    type=PATH,
    default=Path("demo-run"),
    show_default=True,
    help="Folder for all that it makes.",
)
@report_user_errors
def demo(out: Path) -> None:
    """dfq deploy of the small detector that comes with dfq, for onnxruntime on a CPU, and what it
    detects on scenes that nobody saw. Takes minutes.

    Exit code 1: the file was made, and is not right.
    """
    from ..api.demo import run_demo
    from ..runtime.progress import Live

    # It has no options to make it shorter.
    made = run_demo(output_folder(out) or out, Live(advises=False))
    if not made.ok:
        sys.exit(1)

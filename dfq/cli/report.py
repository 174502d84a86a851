"""`dfq report`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import FILE, PATH, report_user_errors


@click.command(short_help="Draw the page of a run: one HTML file to show.")
@click.argument("run", metavar="RUN", type=PATH)
@click.option(
    "--out", metavar="FILE.html", type=FILE, show_default="RUN/report.html", help="The page."
)
@report_user_errors
def report(run: Path, out: str | None) -> None:
    """Draw the page of a finished run as one HTML file: what was done, how close it came, on which
    images, and at what cost.

    RUN is a folder that dfq qat has written, which drew this page when it ended: draw it again
    after exporting the run. The page holds images of the run's set and of its photos.
    """
    from ..api.report import report as verb

    click.echo(str(verb(run, out)))

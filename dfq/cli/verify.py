"""`dfq verify`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..errors import shown
from .options import FILE, output_file, report_user_errors, write_json_output


@click.command(short_help="Tell whether an exported file is right, and computes in integers.")
@click.argument("file")
@click.option(
    "--against",
    required=True,
    metavar="RUN_OR_MODEL",
    help="The run that the file was made from, or a float model: a checkpoint or a float file.",
)
@click.option(
    "--data",
    show_default="what the run was made on",
    help="Images to compare on; with labels, AP or top-1 is measured too.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0, max=1),
    default=0.003,
    show_default=True,
    help="AP or top-1 that the file may be below its run in PyTorch.",
)
@click.option("--json", "json_file", type=FILE, help="Write the result here.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    show_default="the runtime's own choice",
    help="That the runtime may use.",
)
@click.option("--trust", is_flag=True, help="Run what is in the checkpoint.")
@report_user_errors
def verify(
    file: str,
    against: str,
    data: str | None,
    max_drop: float,
    json_file: str | Path | None,
    threads: int | None,
    trust: bool,
) -> None:
    """Compare FILE in its runtime with the run or the float model that it comes from.

    FILE may be anyone's INT8 file (.onnx, .xml, .tflite). The exit code is 1 where a fault is
    found: outputs that are not PyTorch's, layers in float, clipped ranges, one scale for boxes and
    scores, lost detections or accuracy; of anyone's classifier, too many images in another
    category.
    """
    from ..api.verify import verify as verb
    from ..runtime.progress import Live

    json_file = output_file(json_file, inputs=(file, against, data))
    verification = verb(
        file,
        against,
        data=data,
        max_drop=max_drop,
        threads=threads,
        trust=trust,
        progress=Live(),
    )
    write_json_output(json_file, verification.to_dict())
    for line in verification.lines():
        click.echo(shown(line, limit=2000))
    if verification.faults:
        sys.exit(1)

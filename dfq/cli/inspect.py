"""`dfq inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import (
    FILE,
    checkpoint_option,
    output_file,
    report_user_errors,
    write_json_output,
)


@click.command()
@click.option("--model", required=True, help="A detector or classifier, or a run folder.")
@checkpoint_option
@click.option("--json", "json_file", type=FILE, help="Write the result here.")
@click.option("--trust", is_flag=True, help="Run what is in the checkpoint.")
@report_user_errors
def inspect(model: str, json_file: str | Path | None, trust: bool) -> None:
    """List every layer (shape, MACs, bits) and the categories."""
    from ..api.inspect import inspect as verb
    from .tables import print_layers

    json_file = output_file(json_file, inputs=(model,))
    inspection = verb(model, trust=trust)
    print_layers(inspection)
    write_json_output(json_file, inspection.to_dict())

"""`dfq cost`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import FILE, checkpoint_option, output_file, report_user_errors, write_json_output


@click.command(short_help="Count operations, bytes and energy, layer by layer.")
@click.option(
    "--model", required=True, help="A detector or classifier, a run folder or an exported file."
)
@checkpoint_option
@click.option("--image-size", type=int, show_default="the model's", help="Side in pixels.")
@click.option(
    "--measure",
    is_flag=True,
    help="Also time a run or an exported file beside the same network in float.",
)
@click.option(
    "--runtime",
    show_default="the file's; onnxruntime for a run",
    help="With --measure: onnxruntime, openvino or litert.",
)
@click.option("--json", "json_file", type=FILE, help="Write the result here.")
@click.option("--trust", is_flag=True, help="Run what is in the checkpoint.")
@report_user_errors
def cost(
    model: str,
    image_size: int | None,
    measure: bool,
    runtime: str | None,
    json_file: str | Path | None,
    trust: bool,
) -> None:
    """Count what a network costs for one image, layer by layer, beside the same one in float.

    MACs, bit operations, bytes of weights on disk and in memory, the memory that activations take
    at most, and an estimate of the energy. Of an exported file, its size.

    With --measure, latency and throughput in the runtime as well, with one thread and with all: in
    turns with the float network, so that only the ratios carry over to another day.
    """
    from ..api.cost import cost as verb
    from ..errors import UserError, shown
    from ..export.cost import FileCost
    from .tables import print_cost

    json_file = output_file(json_file, inputs=(model,))
    if runtime is not None and not measure:
        raise UserError("--runtime: is for --measure; give both, or leave it out")
    costs = verb(model, image_size=image_size, trust=trust)
    figures, speed = costs.to_dict(), None
    if measure:
        from ..api.speed import measure as time_it
        from ..runtime.progress import Live

        # Before anything is shown: what cannot be timed is one line.
        speed = time_it(model, runtime=runtime, image_size=image_size, trust=trust, progress=Live())
        figures["speed"] = speed.to_dict()
    if isinstance(costs, FileCost):
        click.echo(f"{shown(costs.source)}: {costs.disk_bytes / 1e6:.2f} MB on disk")
        click.echo("layers are listed for models and runs: give the one it was exported from")
    else:
        print_cost(costs)
    for line in (*speed.table(), *speed.said()) if speed is not None else ():
        click.echo(line)
    write_json_output(json_file, figures)

"""`dfq deploy`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..errors import shown
from .options import PATH, checkpoint_option, common_options, output_folder, report_user_errors


def _list_targets(context: click.Context, option: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from ..export.targets import load_target, shipped_targets
    from .tables import print_targets

    print_targets([load_target(name) for name in shipped_targets()])
    context.exit()


@click.command(short_help="From a float model to a checked INT8 file for a target, at once.")
@click.option("--model", required=True, help="Checkpoint, yaml, published name (yolo11s) or demo.")
@checkpoint_option
@click.option("--target", required=True, help="One of --list-targets, or your own YAML file.")
@click.option(
    "--list-targets", is_flag=True, is_eager=True, expose_value=False, callback=_list_targets,
    help="Show the targets that come with dfq.",
)  # fmt: skip
@click.option(
    "--out", type=PATH, show_default="deploy/MODEL-TARGET-N", help="Folder for all of it."
)
@click.option(
    "--images", metavar="DIR", show_default="none",
    help="Real photos, no labels needed: half of them (64 at most) join calibration.",
)  # fmt: skip
@click.option(
    "--data", show_default="synthetic images, made if need be", help="A SET to calibrate on."
)
@click.option("--image-size", type=int, show_default="the model's", help="Side in pixels.")
@click.option("--quick", is_flag=True, help="Fewer synthetic images and steps: a first look.")
@click.option("--seed", type=int, show_default="0", help="Fixes the result.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Override a value of the recipe that the target does not fix.",
)  # fmt: skip
@common_options
@report_user_errors
def deploy(
    model: str,
    target: str,
    out: Path | None,
    images: str | None,
    data: str | None,
    image_size: int | None,
    quick: bool,
    seed: int | None,
    overrides: tuple[str, ...],
    device: str,
    trust: bool,
) -> None:
    """Synthesize images, quantize, export, verify, time and report: a float model in, a checked
    file for the target out.

    The folder holds the file and the float one, the run, report.html and deploy.json with all
    figures. Exit code 1: the file was made, and is not right. Stopped, the same command goes on.
    """
    from ..api.deploy import deploy as verb
    from ..runtime.progress import Live

    made = verb(
        model, target, out=output_folder(out), images=images, data=data, image_size=image_size,
        quick=quick, seed=seed, overrides=overrides, device=device, trust=trust, progress=Live(),
    )  # fmt: skip
    if not made.new:
        click.echo(f"finished already, and left as it is: {shown(made.folder)}")
    for line in made.said:
        click.echo(shown(line, limit=2000))
    for command in made.next:
        click.echo(f"next: {shown(command, limit=2000)}")
    # Last, where scripts look for it.
    click.echo(shown(made.model or made.reference))
    if not made.ok:
        click.echo(
            f"error: {shown(made.model)}: is not right: {len(made.faults)} fault(s)", err=True
        )
        sys.exit(1)

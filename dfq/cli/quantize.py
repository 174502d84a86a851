"""`dfq quantize`; `dfq qat`, which insists on training, and `dfq ptq`, which trains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import UserError, shown
from ..runtime.plain import brief
from .options import (
    PATH,
    F,
    checkpoint_option,
    common_options,
    output_folder,
    quick_option,
    report_user_errors,
    settings_of,
    settings_options,
    tensorboard_option,
)

_select_on = click.option(
    "--select-on",
    show_default="none",
    help="A labelled real SET: keep the epoch with the best AP or top-1 on it, as the paper does.",
)


def _options(command: F) -> F:
    """What all names of the command take."""
    for option in reversed(
        (
            click.option("--recipe", required=True, help="File or shipped recipe (w4a8)."),
            click.option(
                "--model",
                show_default="the recipe's, else what the newest set was made from",
                help="The float detector or classifier.",
            ),
            checkpoint_option,
            click.option(
                "--data",
                show_default="the synthetic one, made if need be",
                help="A SET to train on; labels are needed for a task loss only.",
            ),
            click.option(
                "--image-size",
                type=int,
                show_default="the model's",
                help="Side in pixels of the images to train on.",
            ),
            click.option(
                "--out",
                type=PATH,
                show_default="runs/RECIPE-MODEL-N",
                help="Run folder.",
            ),
            click.option(
                "--photos",
                metavar="DIR",
                show_default="none",
                help="Real photos, no labels needed: half of them (64 at most) join calibration "
                "and rounding, and on the others is said in the end how close the network is.",
            ),
            click.option(
                "--max-cache",
                type=click.FloatRange(min=0),
                default=2.0,
                show_default=True,
                metavar="GIB",
                help="Memory for what goes in and out of a block while it is reconstructed; beyond "
                "it, it is computed again, which changes the time alone.",
            ),
            quick_option,
            tensorboard_option,
            settings_options,
            common_options,
        )
    ):
        command = option(command)
    return command


@click.command(short_help="Make the low-bit network: calibrate, round, train.")
@_options
@_select_on
@report_user_errors
def quantize(**options: Any) -> None:
    """Make the low-bit network: calibrate and round it on its synthetic images, train it, keep
    what is closer to the float one.

    On several GPUs or nodes: torchrun --nproc-per-node=GPUS -m dfq quantize ...
    """
    _quantize(**options)


@click.command(short_help="dfq quantize that trains nothing.")
@_options
@report_user_errors
def ptq(overrides: tuple[str, ...], **options: Any) -> None:
    """dfq quantize that trains nothing: whatever the recipe says, its method is ptq. Which
    reconstruction, --set quantization.reconstruction=METHOD says: none, gptq, adaround,
    adaquant, brecq, apq, qdrop, pd, spq, mgrq, pfcr, task or best.
    """
    from ..recipe.overrides import parse_override

    for key, method in map(parse_override, overrides):
        if key == "method" and method != "ptq":
            raise UserError(
                f"--set method={brief(method)}: dfq ptq trains nothing; leave it out, or run dfq "
                "quantize"
            )
    # As a setting, so that those which go with it alone are not refused.
    _quantize(overrides=(*overrides, "method=ptq"), select_on=None, **options)


@click.command(short_help="dfq quantize that insists on training.")
@_options
@_select_on
@report_user_errors
def qat(overrides: tuple[str, ...], **options: Any) -> None:
    """dfq quantize that insists on training: a recipe whose method is auto has method qat, which
    fails where training diverges, unless --set says another method.

    On several GPUs or nodes: torchrun --nproc-per-node=GPUS -m dfq qat ...
    """
    _quantize(overrides=overrides, method="qat", **options)


def _quantize(
    recipe: str,
    model: str | None,
    data: str | None,
    image_size: int | None,
    out: Path | None,
    select_on: str | None,
    photos: str | None,
    quick: bool,
    tensorboard: Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    device: str,
    trust: bool,
    max_cache: float,
    method: str | None = None,
) -> None:
    """The command by any of its names, one of which has a method in the place of auto."""
    from ..api.quantize import quantize as verb
    from ..recipe import find_recipe
    from ..runs.comparison import number
    from ..runs.folder import read_metrics
    from ..runtime.distributed import is_main_process
    from ..runtime.progress import Live

    settings = settings_of(
        recipe,
        overrides,
        quick=quick,
        seed=seed,
        model=model,
        distillation__select_on=select_on,
        synthesis__image_size=image_size,
    )
    states_method = any(text.partition("=")[0].strip() == "method" for text in overrides)
    if method is not None and not states_method and settings.method == "auto":
        settings = settings.model_copy(update={"method": method})
    folder = verb(
        settings,
        model=model,
        data=data,
        image_size=image_size,
        out=output_folder(out),
        name=find_recipe(recipe).stem,
        photos=photos,
        quick=quick,
        device=device,
        trust=trust,
        max_cache=max_cache,
        progress=Live(),
        tensorboard=output_folder(tensorboard, "tensorboard"),
    )
    if not is_main_process():
        return
    metrics = read_metrics(folder)
    share = metrics["quantized_share_of_macs"]
    # Runs of earlier versions say no more than what was selected.
    said = metrics.get("said")
    for line in said if isinstance(said, list) else [metrics["selected"]]:
        click.echo(shown(line, limit=2000))
    click.echo(f"{share:.1%} of the MACs quantized")
    measured = metrics.get("evaluation")
    for name, value in measured.items() if isinstance(measured, dict) else ():
        if isinstance(value, dict):
            keys = ("AP", "AP50") if number(value, "top1") is None else ("top1", "top5", "f1_macro")
            figures = {key: number(value, key) for key in keys}
            if value.get("masks"):
                figures["mask AP"] = number(value["masks"], "AP")
            # There is none where there was nothing to find.
            cells = (f"{k} {'none' if v is None else format(v, '.3f')}" for k, v in figures.items())
            click.echo(f"{shown(name)}: {'  '.join(cells)}")
    click.echo(str(folder))

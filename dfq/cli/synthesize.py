"""`dfq synthesize`."""

from __future__ import annotations

from pathlib import Path

import click

from ..runtime.limits import MOST_WORKERS
from .options import (
    PATH,
    checkpoint_option,
    common_options,
    output_folder,
    quick_option,
    report_user_errors,
    settings_of,
    settings_options,
    tell_quality,
    tensorboard_option,
)


@click.command()
@click.option("--model", required=True, help="Checkpoint, yaml, published name (yolo11s) or demo.")
@checkpoint_option
@click.option("--out", type=PATH, show_default="in the cache", help="Folder of the set.")
@click.option("--images", type=int, show_default="512, or the recipe's", help="How many.")
@click.option("--image-size", type=int, show_default="the model's", help="Side in pixels.")
@click.option(
    "--iterations", type=int, show_default="200, or the recipe's", help="Of the image stage."
)
@click.option(
    "--batch-size", type=int, show_default="32, or the recipe's", help="Images optimised together."
)
@click.option(
    "--labels",
    show_default="adaptive, or the recipe's",
    help="adaptive, single, multi, tile, none; real:SET to take a SET's; multi:SET or tile:SET for "
    "random ones as frequent and large as a SET's.",
)
@click.option(
    "--init",
    type=click.Choice(["uniform", "gaussian", "noise"]),
    show_default="uniform, or the recipe's",
    help="What images start from; noise: Gaussian, and left as it is, without labels.",
)
@click.option(
    "--recipe",
    show_default="built-in values",
    help="File or shipped recipe whose synthesis section is used.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1, max=MOST_WORKERS),
    show_default="on a CPU as many as are worth starting, on a GPU one",
    help="Processes on this machine.",
)
@click.option(
    "--shards-at-once",
    type=click.IntRange(min=1, max=MOST_WORKERS),
    show_default="on a GPU as many as are quickest, on a CPU one",
    help="Batches that a process optimises side by side.",
)
@quick_option
@tensorboard_option
@settings_options
@common_options
@report_user_errors
def synthesize(
    model: str,
    out: Path | None,
    images: int | None,
    image_size: int | None,
    iterations: int | None,
    batch_size: int | None,
    labels: str | None,
    init: str | None,
    recipe: str | None,
    workers: int | None,
    shards_at_once: int | None,
    quick: bool,
    tensorboard: Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    device: str,
    trust: bool,
) -> None:
    """Make labelled images out of the network itself.

    On several GPUs or nodes: torchrun --nproc-per-node=GPUS -m dfq synthesize ...
    """
    from ..api.synthesize import synthesize as verb
    from ..recipe import as_noise
    from ..runtime.distributed import is_main_process
    from ..runtime.progress import Live

    init, iterations, labels = as_noise(init, iterations, labels, overrides)
    settings = settings_of(
        recipe,
        overrides,
        quick=quick,
        seed=seed,
        synthesis__images=images,
        synthesis__image_size=image_size,
        synthesis__iterations=iterations,
        synthesis__batch_size=batch_size,
        synthesis__labels=labels,
        synthesis__init=init,
    )
    made = verb(
        model,
        settings,
        out=output_folder(out),
        quick=quick,
        device=device,
        trust=trust,
        progress=Live(),
        workers=workers,
        shards_at_once=shards_at_once,
        tensorboard=output_folder(tensorboard, "tensorboard"),
    )
    if not is_main_process():
        return
    objects = sum(len(label) for label in made.labels)
    tell_quality(made)
    # Last, where scripts look for it.
    click.echo(f"{len(made)} images, {objects} objects: {made.root}")

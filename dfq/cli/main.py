"""The command line: parse, call a verb, print. A user's mistake is one line and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .._version import __version__
from ..errors import shown
from ..runtime.limits import MOST_WORKERS
from ..runtime.processes import end_with_launcher
from .compare import compare
from .cost import cost
from .data import data
from .deploy import deploy
from .export import export
from .mmdet_config import mmdet_config
from .options import (
    FILE,
    PATH,
    F,
    checkpoint_option,
    common_options,
    output_file,
    output_folder,
    report_user_errors,
    require_streams,
    settings_of,
    settings_options,
    tell_quality,
    write_json_output,
)
from .predict import predict
from .recipe import recipe
from .report import report
from .sensitivity import sensitivity
from .verify import verify


def _tensorboard(command: F) -> F:
    return click.option(
        "--tensorboard",
        type=PATH,
        show_default="none are written",
        help="Folder for the curves of the loss.",
    )(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Make a trained object detector small without its training data.

    A SET is a folder with annotations.json and images/ (COCO; also what dfq writes), a COCO
    .json beside its images, a YOLO data.yaml, or a Pascal VOC folder. Where no labels are needed
    (qat, sensitivity, data show), a folder of photos will do.
    """


@cli.command()
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
    show_default="as many as are worth starting",
    help="Processes on this machine's CPU cores.",
)
@_tensorboard
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
    tensorboard: Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    device: str,
    trust: bool,
) -> None:
    """Make labelled images out of the detector itself.

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
        device=device,
        trust=trust,
        progress=Live(),
        workers=workers,
        tensorboard=output_folder(tensorboard, "tensorboard"),
    )
    if not is_main_process():
        return
    objects = sum(len(label) for label in made.labels)
    tell_quality(made)
    # Last, where scripts look for it.
    click.echo(f"{len(made)} images, {objects} objects: {made.root}")


@cli.command()
@click.option("--recipe", required=True, help="File or shipped recipe (w4a8).")
@click.option(
    "--model",
    show_default="the recipe's, else what the newest set was made from",
    help="The float detector.",
)
@checkpoint_option
@click.option(
    "--data",
    show_default="the synthetic one, made if need be",
    help="A SET to train on; labels are needed for a task loss only.",
)
@click.option(
    "--image-size",
    type=int,
    show_default="the model's",
    help="Side in pixels of the images to train on.",
)
@click.option(
    "--out",
    type=PATH,
    show_default="runs/RECIPE-MODEL-N",
    help="Run folder.",
)
@click.option(
    "--select-on",
    show_default="none",
    help="A labelled real SET: keep the epoch with the best AP on it, as the paper does.",
)
@click.option(
    "--photos",
    metavar="DIR",
    show_default="none",
    help="Real photos, no labels needed: half of them (64 at most) join calibration and rounding, "
    "and on the others is said in the end how close the network is.",
)
@_tensorboard
@settings_options
@common_options
@report_user_errors
def qat(
    recipe: str,
    model: str | None,
    data: str | None,
    image_size: int | None,
    out: Path | None,
    select_on: str | None,
    photos: str | None,
    tensorboard: Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    device: str,
    trust: bool,
) -> None:
    """Train the low-bit detector on its synthetic images.

    On several GPUs or nodes: torchrun --nproc-per-node=GPUS -m dfq qat ...
    """
    from ..api.quantize import quantize
    from ..recipe import find_recipe
    from ..runs.comparison import number
    from ..runs.folder import read_metrics
    from ..runtime.distributed import is_main_process
    from ..runtime.progress import Live

    settings = settings_of(
        recipe,
        overrides,
        seed=seed,
        model=model,
        distillation__select_on=select_on,
        synthesis__image_size=image_size,
    )
    folder = quantize(
        settings,
        model=model,
        data=data,
        image_size=image_size,
        out=output_folder(out),
        name=find_recipe(recipe).stem,
        photos=photos,
        device=device,
        trust=trust,
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
            figures = {key: number(value, key) for key in ("AP", "AP50")}
            if value.get("masks"):
                figures["mask AP"] = number(value["masks"], "AP")
            # There is none where there was nothing to find.
            cells = (f"{k} {'none' if v is None else format(v, '.3f')}" for k, v in figures.items())
            click.echo(f"{shown(name)}: {'  '.join(cells)}")
    click.echo(str(folder))


@cli.command("eval")
@click.option("--model", required=True, help="A detector, a run folder or an exported file.")
@checkpoint_option
@click.option("--data", required=True, help="A labelled SET; with --against, any photos.")
@click.option(
    "--against",
    metavar="FLOAT",
    show_default="the labels of --data",
    help="Measure against what this float detector detects, and not against labels.",
)
@click.option("--image-size", type=int, show_default="the model's", help="Side in pixels.")
@click.option(
    "--interval",
    is_flag=True,
    help="Also say between which values AP would be on other draws of images (95 %, bootstrap).",
)
@click.option("--json", "json_file", type=FILE, help="Write the result here.")
@common_options
@report_user_errors
def evaluate(
    model: str,
    data: str,
    against: str | None,
    image_size: int | None,
    interval: bool,
    json_file: str | Path | None,
    device: str,
    trust: bool,
) -> None:
    """Measure COCO AP, against labels or against another network."""
    from ..api.evaluate import evaluate as verb
    from ..evaluation.agreement import Agreement
    from ..runtime.progress import Live
    from .tables import print_agreement, print_metrics

    json_file = output_file(json_file, inputs=(model, data, against))
    found = verb(
        model,
        data,
        against=against,
        image_size=image_size,
        interval=interval,
        device=device,
        trust=trust,
        progress=Live(),
    )
    write_json_output(json_file, found.to_dict())
    if isinstance(found, Agreement):
        print_agreement(found)
    else:
        print_metrics(found.to_dict())


@cli.command()
@click.option("--model", required=True, help="A detector or a run folder.")
@checkpoint_option
@click.option("--json", "json_file", type=FILE, help="Write the result here.")
@click.option("--trust", is_flag=True, help="Run what is in the checkpoint.")
@report_user_errors
def inspect(model: str, json_file: str | Path | None, trust: bool) -> None:
    """List every layer (shape, MACs, bits) and the categories."""
    from ..api.inspect import inspect as verb
    from .tables import print_layers

    json_file = output_file(json_file, inputs=(model,))
    found = verb(model, trust=trust)
    print_layers(found)
    write_json_output(json_file, found.to_dict())


@cli.command(short_help="Deploy the small detector that comes with dfq, in minutes.")
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

    made = run_demo(output_folder(out) or out, Live())
    if not made.ok:
        sys.exit(1)


cli.add_command(compare)
cli.add_command(cost)
cli.add_command(data)
cli.add_command(deploy)
cli.add_command(export)
cli.add_command(mmdet_config)
cli.add_command(predict)
cli.add_command(recipe)
cli.add_command(report)
cli.add_command(sensitivity)
cli.add_command(verify)


def main() -> None:
    """Entry point of `dfq`."""
    require_streams()
    end_with_launcher()
    cli()


if __name__ == "__main__":
    main()

"""The command line: parse, call a verb, print. A user's mistake is one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import click

from . import __version__
from .cli_common import F, check_output, checkpoint_option, mendable
from .cli_data import data
from .cli_mmdet import mmdet_config
from .errors import UserError
from .processes import end_with_launcher


def _common(command: F) -> F:
    """`--device` and `--trust`."""
    command = click.option(
        "--trust", is_flag=True, help="Run what is in the checkpoint: only if you trust its author."
    )(command)
    return click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, ..."
    )(command)


def _settings(command: F) -> F:
    """`--seed` and `--set`."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a value of the recipe, e.g. distillation.epochs=10.",
    )(command)
    return click.option("--seed", type=int, help="Fixes the result.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Make a trained object detector small without its training data.

    A SET is a folder with annotations.json and images/ (COCO; also what dfq writes), a COCO
    .json beside its images, a YOLO data.yaml, or a Pascal VOC folder.
    """


@cli.command()
@click.option("--model", required=True, help="Checkpoint, yaml, published name (yolo11s) or demo.")
@checkpoint_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder; default: the cache.")
@click.option("--images", type=int, help="How many.")
@click.option("--image-size", type=int, help="Side in pixels; default: the model's.")
@click.option("--iterations", type=int, help="Of the image stage.")
@click.option("--batch-size", type=int, help="Images optimised together.")
@click.option("--labels", help="adaptive, single, multi, tile, none, or real:SET to take a SET's.")
@click.option(
    "--init",
    type=click.Choice(["uniform", "gaussian", "noise"]),
    help="What images start from; noise: uniform, and left as it is, without labels.",
)
@click.option("--recipe", help="File or shipped recipe whose synthesis section is used.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes on this machine's CPU cores; default: as many as are worth starting.",
)
@click.option(
    "--tensorboard", type=click.Path(path_type=Path), help="Folder for the curves of the loss."
)
@_settings
@_common
@mendable
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
    from .distributed import leads
    from .progress import Live
    from .recipe import load_recipe
    from .verbs import synthesize as verb

    if init == "noise":
        given = {text.partition("=")[0] for text in overrides}
        if iterations or "synthesis.iterations" in given:
            raise UserError("--init noise stays as it is: leave the iterations out")
        iterations, init = 0, "uniform"
        labels = labels or (None if "synthesis.labels" in given else "none")
    settings = load_recipe(
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
        out=out,
        device=device,
        trust=trust,
        progress=Live(),
        workers=workers,
        tensorboard=tensorboard,
    )
    if not leads():
        return
    objects = sum(len(label) for label in made.labels)
    click.echo(f"{len(made)} images, {objects} objects: {made.root}")


@cli.command()
@click.option("--recipe", required=True, help="File or shipped recipe (w4a8).")
@click.option(
    "--model",
    help="The float detector; default: the recipe's, else what the newest set was made from.",
)
@checkpoint_option
@click.option("--data", help="A SET to train on; default: the synthetic one, made if need be.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.")
@click.option(
    "--select-on",
    help="A labelled real SET: keep the epoch with the best AP on it, as the paper does.",
)
@_settings
@_common
@mendable
def qat(
    recipe: str,
    model: str | None,
    data: str | None,
    out: Path | None,
    select_on: str | None,
    seed: int | None,
    overrides: tuple[str, ...],
    device: str,
    trust: bool,
) -> None:
    """Train the low-bit detector on its synthetic images.

    On several GPUs or nodes: torchrun --nproc-per-node=GPUS -m dfq qat ...
    """
    from .distributed import leads
    from .progress import Live
    from .recipe import find_recipe, load_recipe
    from .run import read_metrics
    from .verbs import quantize

    settings = load_recipe(recipe, overrides, seed=seed, distillation__select_on=select_on)
    folder = quantize(
        settings,
        model=model,
        data=data,
        out=out,
        name=find_recipe(recipe).stem,
        device=device,
        trust=trust,
        progress=Live(),
    )
    if not leads():
        return
    metrics = read_metrics(folder)
    share = metrics["quantized_share_of_macs"]
    click.echo(f"{metrics['selected']}; {share:.1%} of the MACs quantized")
    for name, value in metrics.get("evaluation", {}).items():
        if name != "data":
            masks = f"  mask AP {value['masks']['AP']:.3f}" if value["masks"] else ""
            click.echo(f"{name}: AP {value['AP']:.3f}  AP50 {value['AP50']:.3f}{masks}")
    click.echo(str(folder))


@cli.command()
@click.option("--model", required=True, help="The float detector.")
@click.option("--data", help="A SET to measure on; default: the synthetic one, made if need be.")
@click.option("--recipe", help="File or shipped recipe whose quantization section is used.")
@click.option(
    "--budget",
    help="What all layers may cost together: as much as w4a8 throughout, or a number (12.5G).",
)
@click.option(
    "--cost",
    type=click.Choice(["bit_operations", "bytes"]),
    help="What the budget is in: bit operations of an image, or bytes of weights.",
)
@click.option("--images", type=int, help="Images of the set it is measured on.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result here.")
@_settings
@_common
@mendable
def sensitivity(
    model: str,
    data: str | None,
    recipe: str | None,
    budget: str | None,
    cost: str | None,
    images: int | None,
    json_file: Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    device: str,
    trust: bool,
) -> None:
    """Measure what each layer's bits do to the predictions, and spread a budget over the layers.

    Recipes with quantization.mixed.budget do this by themselves.
    """
    from .cli_tables import print_sensitivity
    from .dataset.calibration import write_json
    from .distributed import leads
    from .progress import Live
    from .recipe import load_recipe
    from .verbs import sensitivity as verb

    check_output(json_file)
    settings = load_recipe(
        recipe,
        overrides,
        seed=seed,
        quantization__mixed__budget=budget,
        quantization__mixed__cost=cost,
        quantization__mixed__images=images,
    )
    found = verb(model, settings, data=data, device=device, trust=trust, progress=Live())
    if not leads():
        return
    print_sensitivity(found, model)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, found.to_dict())


@cli.command("eval")
@click.option("--model", required=True, help="A detector or a run folder.")
@checkpoint_option
@click.option("--data", required=True, help="A labelled SET.")
@click.option("--image-size", type=int, help="Side in pixels; default: the model's.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result here.")
@_common
@mendable
def evaluate(
    model: str, data: str, image_size: int | None, json_file: Path | None, device: str, trust: bool
) -> None:
    """Measure COCO AP."""
    from .dataset.calibration import write_json
    from .progress import Live
    from .verbs import evaluate as verb

    check_output(json_file)
    found = verb(
        model, data, image_size=image_size, device=device, trust=trust, progress=Live()
    ).to_dict()
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, found)
    masks = found["masks"]
    if masks is not None:
        click.echo(f"{'':<10} boxes   masks")
    for key in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100"):
        values = [one[key] for one in (found, masks) if one is not None]
        cells = ("none  " if value is None else format(value, ".4f") for value in values)
        click.echo(f"{key:<10} {'  '.join(cells)}".rstrip())
    click.echo(f"{found['images']} images at {found['image_size']} px")
    if masks is not None and masks["images"] < found["images"]:
        click.echo(f"masks on {masks['images']} of them, whose objects all have an outline")
    if found["missing_categories"]:
        click.echo(f"not measured, unknown to the model: {', '.join(found['missing_categories'])}")


@cli.command()
@click.option("--model", required=True, help="A detector or a run folder.")
@checkpoint_option
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result here.")
@click.option("--trust", is_flag=True, help="Run what is in the checkpoint.")
@mendable
def inspect(model: str, json_file: Path | None, trust: bool) -> None:
    """List every layer: shape, MACs, bits."""
    from .cli_tables import print_layers
    from .dataset.calibration import write_json
    from .verbs import inspect as verb

    check_output(json_file)
    found = verb(model, trust=trust)
    print_layers(found)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, found.to_dict())


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True)
@mendable
def demo(out: Path) -> None:
    """The whole flow in minutes, on the small detector that comes with dfq."""
    from .demo.flow import run_demo
    from .progress import Live

    run_demo(out, Live())


cli.add_command(data)
cli.add_command(mmdet_config)


def main() -> None:
    """Entry point of `dfq`."""
    end_with_launcher()
    cli()


if __name__ == "__main__":
    main()

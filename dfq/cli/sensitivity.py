"""`dfq sensitivity`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import (
    FILE,
    checkpoint_option,
    common_options,
    output_file,
    report_user_errors,
    settings_of,
    settings_options,
    write_json_output,
)


@click.command(short_help="Measure what each layer's bits do, and spread a budget.")
@click.option("--model", required=True, help="The float detector or classifier.")
@checkpoint_option
@click.option(
    "--data",
    show_default="the synthetic one, made if need be",
    help="A SET to measure on; labels are not needed.",
)
@click.option(
    "--recipe",
    show_default="built-in values",
    help="File or shipped recipe whose quantization section is used.",
)
@click.option(
    "--budget",
    show_default="none, or the recipe's",
    help="What all layers may cost together: as much as w4a8 throughout, or a number (12.5G).",
)
@click.option(
    "--cost",
    type=click.Choice(["bit_operations", "bytes"]),
    show_default="bit_operations, or the recipe's",
    help="What the budget is in: bit operations of an image, or bytes of weights.",
)
@click.option(
    "--images",
    type=int,
    show_default="16, or the recipe's",
    help="Images of the set it is measured on.",
)
@click.option("--json", "json_file", type=FILE, help="Write the result here.")
@settings_options
@common_options
@report_user_errors
def sensitivity(
    model: str,
    data: str | None,
    recipe: str | None,
    budget: str | None,
    cost: str | None,
    images: int | None,
    json_file: str | Path | None,
    seed: int | None,
    overrides: tuple[str, ...],
    device: str,
    trust: bool,
) -> None:
    """Measure what each layer's bits do to the predictions, and spread a budget over the layers.

    Recipes with quantization.mixed.budget do this by themselves.
    """
    from ..api.sensitivity import sensitivity as verb
    from ..runtime.distributed import is_main_process
    from ..runtime.progress import Live
    from .tables import print_sensitivity

    json_file = output_file(json_file, inputs=(model, data, recipe))
    settings = settings_of(
        recipe,
        overrides,
        seed=seed,
        quantization__mixed__budget=budget,
        quantization__mixed__cost=cost,
        quantization__mixed__images=images,
    )
    measured = verb(model, settings, data=data, device=device, trust=trust, progress=Live())
    if not is_main_process():
        return
    print_sensitivity(measured, model)
    write_json_output(json_file, measured.to_dict())

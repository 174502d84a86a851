"""`dfq mmdet-config`."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_common import PATH, mendable, output_file, write_output
from .errors import UserError


@click.command("mmdet-config", short_help="Write a config for mmdet's own training script.")
@click.argument("base", type=PATH)
@click.option("--recipe", required=True, help="File or shipped recipe (w8a8).")
@click.option(
    "--checkpoint",
    type=PATH,
    show_default="random ones",
    help="Float weights of BASE.",
)
@click.option(
    "--data",
    type=PATH,
    default=Path("calibration-set"),
    show_default=True,
    help="The calibration set, made by dfq synthesize.",
)
@click.option("--out", type=PATH, show_default="BASE-RECIPE.py here", help="File.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value.")
@mendable
def mmdet_config(
    base: Path,
    recipe: str,
    checkpoint: Path | None,
    data: Path,
    out: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Write the config with which mmdet's own tools/train.py trains BASE by a recipe.

    BASE is the detector's own config, a file.
    """
    from .detectors.mmdet_config import read_config
    from .integrations.mmdet_recipe import mmdet_config as text_of
    from .recipe import find_recipe, load_recipe

    if not base.is_file():
        raise UserError(f"{base}: there is no such config; give the detector's own, a .py file")
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f"--checkpoint {checkpoint}: there is no such file")
    settings = load_recipe(recipe, overrides)
    inherited = read_config(base)
    found = find_recipe(recipe)
    own = Path(recipe).is_file()
    target = out or Path(f"{base.stem}-{found.stem}.py")
    inputs = (base, recipe if own else None, checkpoint, data)
    target = output_file(target, "out", inputs) or target
    text = text_of(
        settings,
        str(found.resolve()) if own else found.stem,
        str(base.resolve()),
        checkpoint=str(checkpoint.resolve()) if checkpoint else None,
        data=str(data.resolve()),
        name=str(target),
        overrides=overrides,
        inherited=inherited,
    )
    write_output(target, text.encode(), "out")
    click.echo(str(target))

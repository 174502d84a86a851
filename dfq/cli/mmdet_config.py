"""`dfq mmdet-config`."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UserError
from ..runtime.suggest import suggestion
from .options import FILE, PATH, output_file, report_user_errors, write_output


@click.command("mmdet-config", short_help="Write a config for mmdet's own training script.")
@click.argument("base", type=PATH)
@click.option("--recipe", required=True, help="File or shipped recipe (w8a8).")
@click.option("--checkpoint", type=PATH, help="Float weights of BASE.")
@click.option("--random-weights", is_flag=True, help="Do without weights of BASE.")
@click.option(
    "--data",
    type=PATH,
    default=Path("calibration-set"),
    show_default=True,
    help="The calibration set, made by dfq synthesize.",
)
@click.option("--out", type=FILE, show_default="BASE-RECIPE.py here", help="File.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value.")
@report_user_errors
def mmdet_config(
    base: Path,
    recipe: str,
    checkpoint: Path | None,
    random_weights: bool,
    data: Path,
    out: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Write the config with which mmdet's own tools/train.py trains BASE by a recipe.

    BASE is the detector's own config, a file. Its validation set is kept if it is there.
    """
    from ..data.calibration_set import CalibrationSet
    from ..integrations.mmdet_config import TRAINED, compares
    from ..integrations.mmdet_config import mmdet_config as text_of
    from ..models.mmdet.config import missing_validation, read_config
    from ..recipe import find_recipe, load_recipe

    if not base.is_file():
        beside = [str(path) for path in sorted(base.parent.glob("*.py"))]
        raise UserError(
            f"{base}: there is no such config; give the detector's own, a .py file"
            f"{suggestion(str(base), beside)}"
        )
    if checkpoint is not None and random_weights:
        raise UserError("--checkpoint and --random-weights contradict: leave one out")
    if checkpoint is None and not random_weights:
        raise UserError(
            f"{base}: is a network without weights; give them with --checkpoint FILE, or say "
            "--random-weights"
        )
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f"--checkpoint {checkpoint}: there is no such file")
    settings = load_recipe(recipe, overrides)
    CalibrationSet.open(data)
    inherited = read_config(base)
    missing = missing_validation(inherited)
    recipe_file = find_recipe(recipe)
    recipe_is_file = Path(recipe).is_file()
    named = out or f"{base.stem}-{recipe_file.stem}.py"
    inputs = (base, recipe if recipe_is_file else None, checkpoint, data)
    target = output_file(named, "out", inputs) or Path(named)
    text = text_of(
        settings,
        str(recipe_file.resolve()) if recipe_is_file else recipe_file.stem,
        str(base.resolve()),
        checkpoint=str(checkpoint.resolve()) if checkpoint else None,
        data=str(data.resolve()),
        name=str(target),
        overrides=overrides,
        inherited=inherited,
        missing=missing,
    )
    write_output(target, text.encode(), "out")
    if (asked := compares(settings)) is not None:
        click.echo(
            f"{asked} compares in the end, which mmdet's Runner does not: {' '.join(TRAINED)} "
            "stands in the config",
            err=True,
        )
    if missing is not None:
        click.echo(
            f"without validation: {base} measures on a set that is not here ({missing})", err=True
        )
    click.echo(str(target))

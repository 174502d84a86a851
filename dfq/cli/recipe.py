"""`dfq recipe`."""

from __future__ import annotations

import click

from .options import report_user_errors


@click.group(short_help="List the shipped recipes, or show every knob of one.")
def recipe() -> None:
    """List the shipped recipes, or show every knob of one."""


@recipe.command("list", short_help="Name, bit widths and purpose of the shipped recipes.")
@report_user_errors
def list_recipes() -> None:
    """List the shipped recipes: name, bit widths, purpose."""
    from ..recipe.text import described_recipes

    rows = described_recipes()
    wide = max(len(row.name) for row in rows), max(len(row.widths) for row in rows)
    for row in rows:
        click.echo(f"{row.name:<{wide[0]}}  {row.widths:<{wide[1]}}  {row.purpose}")


@recipe.command(short_help="Show every knob of a recipe.")
@click.argument("name")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value.")
@report_user_errors
def show(name: str, overrides: tuple[str, ...]) -> None:
    """Show every knob of the recipe NAME, a file or a shipped one, as YAML that is a recipe again.

    What it extends is resolved; each knob has a comment, and what is not the default says so.
    """
    from ..errors import shown
    from ..recipe import find_recipe, load_recipe
    from ..recipe.text import commented, purpose_of
    from ..runtime.plain import read_small

    settings = load_recipe(name, overrides)
    if purpose := purpose_of(read_small(find_recipe(name))):
        click.echo(f"# {shown(purpose)}.\n")
    click.echo(commented(settings), nl=False)

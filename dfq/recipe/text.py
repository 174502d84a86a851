"""Recipes as text for people: every knob with what it does, from the docstrings of the settings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from ..runtime.settings import Section
from . import Recipe, load_recipe, shipped_recipes

WIDTH = 100

_GENERATED = """\
# Every knob with its default. `extends: default` takes them all; so does a recipe without it.
#
#   dfq qat --recipe default --model yolo11s
#
# Override any knob, for example a quicker run:
#
#   dfq qat --recipe default --model yolo11s --set distillation.epochs=2
#
# Generated from the settings' docstrings: change those, then `make recipes`.
"""


def default_text() -> str:
    """What `recipes/default.yaml` holds."""
    return f"{_GENERATED}\n{commented(Recipe())}"


def commented(recipe: Recipe) -> str:
    """Every value of a recipe as YAML, below a comment that says what it is for; those that are not
    the default name it."""
    return "\n".join(_lines(recipe, Recipe(), "")) + "\n"


def _lines(section: Section, default: Section, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value, usual = getattr(section, name), getattr(default, name)
        if isinstance(value, Section):
            if not indent:
                yield ""
            yield f"{indent}{name}:"
            yield from _lines(value, usual, f"{indent}  ")
            continue
        yield from _comment(field, indent)
        differs = "" if value == usual else f"  # default: {_yaml(usual)}"
        yield f"{indent}{name}: {_yaml(value)}{differs}"


def _comment(field: FieldInfo, indent: str) -> list[str]:
    words = " ".join((field.description or "").split()).replace("`", "")
    words = re.sub(r"\bNone\b", "null", words)
    start = f"{indent}# "
    lines = textwrap.wrap(
        words,
        WIDTH,
        initial_indent=start,
        subsequent_indent=start,
        break_long_words=False,
        break_on_hyphens=False,
    )
    if choices := list(_choices(field.annotation)):
        lines.append(f"{start}One of: {' | '.join(choices)}.")
    return lines


def _choices(annotation: Any) -> Iterator[str]:
    """The values that a `Literal` allows; nothing for other types."""
    if get_origin(annotation) is Literal:
        yield from map(_yaml, get_args(annotation))


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


@dataclass(frozen=True)
class Described:
    """A shipped recipe in a line.

    Attributes:
        name: without suffix.
        widths: of weights and activations, as "W4A8"; what the budget of mixed ones is.
        purpose: the first sentence of its header.
    """

    name: str
    widths: str
    purpose: str


def described_recipes() -> list[Described]:
    """The shipped recipes, by name."""
    return [_described(name, path) for name, path in shipped_recipes().items()]


def _described(name: str, path: Path) -> Described:
    section = load_recipe(name).quantization
    widths = f"W{section.weight_bits}A{section.activation_bits}"
    if section.mixed.budget is not None:
        widths = f"mixed, as {section.mixed.budget.upper()}"
    return Described(name, widths, purpose_of(path.read_text(encoding="utf-8")))


def purpose_of(text: str) -> str:
    """The first sentence of the comment that a recipe opens with; empty where there is none."""
    opening = []
    for line in text.splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        opening.append(line.strip("# "))
    first, _, _ = " ".join(opening).partition(". ")
    return first.removesuffix(".")

"""Values that take the place of a recipe's: texts of the command line, or a mapping."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import UserError, argument, shown
from ..runtime.plain import brief, parse_yaml
from ..runtime.settings import Section
from .removed import present_name

Overrides = Mapping[str, Any] | Sequence[str]
"""Values that replace a recipe's: `section.key=value` texts, whose values are read as YAML; or a
mapping of these keys, or of sections, to values."""


def override(
    data: dict[str, Any], overrides: Overrides, values: dict[str, Any], kind: type[Section]
) -> dict[str, str]:
    """Put other values in the place of a recipe's.

    Args:
        data: the recipe's sections, changed in place.
        overrides, values: as for `load_recipe`.
        kind: the recipe's model.

    Returns:
        The keys, with dots, that have other values now, and how a message about one begins.

    Raises:
        UserError: an override is none, or goes into what is no section.
    """
    stated: dict[str, str] = {}
    if isinstance(overrides, Mapping):
        pairs = list(flat(overrides, kind))
    else:
        # One text is a sequence of texts too, of a letter each.
        texts = (overrides,) if isinstance(overrides, str) else overrides
        pairs = [parse_override(text) for text in texts]
    for key, value in pairs:
        stated[_assign(data, key, value)] = "--set"
    for name, value in values.items():
        if value is not None:
            key = _assign(data, name.replace("__", "."), value)
            stated[key] = f"{argument(key.rpartition('.')[2])}:"
    return stated


def merged(layers: Sequence[dict[str, Any]], kind: type[Section]) -> dict[str, Any]:
    """Sections of several recipes in one: where more than one has a value, the first has its way.

    Args:
        layers: each recipe's sections, the strongest first; they are left as they are.
        kind: the recipe's model.
    """
    data: dict[str, Any] = {}
    for layer in reversed(layers):
        _put(data, copy.deepcopy(layer), kind, "")
    return data


def _put(below: dict[str, Any], above: dict[str, Any], kind: type[Section], where: str) -> None:
    for name, value in above.items():
        key = f"{where}{name}"
        if not _is_section(key, kind) or below.get(name) is None:
            below[name] = value
        elif value is None or not isinstance(below[name], dict):
            # An empty section says nothing; what is none is told of when all is checked.
            continue
        elif isinstance(value, dict):
            _put(below[name], value, kind, f"{key}.")
        else:
            below[name] = value


def flat(
    overrides: Mapping[str, Any], kind: type[Section], above: str = ""
) -> Iterator[tuple[str, Any]]:
    """Keys with dots and their values; the mapping that a section has becomes its keys'."""
    for name, value in overrides.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and _is_section(key, kind):
            yield from flat(value, kind, f"{key}.")
        else:
            yield key, value


def _is_section(key: str, kind: Any) -> bool:
    for part in key.split("."):
        known = isinstance(kind, type) and issubclass(kind, Section)
        if not known or part not in kind.model_fields:
            return False
        kind = kind.model_fields[part].annotation
    return isinstance(kind, type) and issubclass(kind, Section)


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of `section.key=value`.

    Raises:
        UserError: it is something else.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {shown(text)}: write section.key=value")
    try:
        return key, parse_yaml(value, "")
    except UserError as error:
        reason = str(error).removeprefix(": ").removeprefix("not valid YAML: ")
        cut = value if len(value) <= 100 and value.isprintable() else f"{brief(value)[1:-1]}"
        if not reason.startswith(("holds", "is", "the key", "*")):
            # What is wrong with it, who reads it sees.
            reason = f"'{cut}' is not a YAML value"
        raise UserError(f"--set {shown(key)}={cut}: {reason}") from None


def _assign(data: dict[str, Any], key: str, value: Any) -> str:
    """Set the value of a key with dots; returns what the key is called now."""
    key, value = present_name(key, value, "override")
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1]):
        if data.get(part) is None:
            data[part] = {}
        if not isinstance(data[part], dict):
            raise UserError(f"--set {key}: {'.'.join(parts[: depth + 1])} is no section")
        data = data[part]
    data[parts[-1]] = value
    return key

"""What checkpoints and descriptions say beside the tensors: names, sizes, digests; checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..runtime.limits import LARGEST_SIDE, LONGEST_NAME, MOST_CLASSES
from ..runtime.plain import brief


def listed_names(names: Any, source: str) -> list[str]:
    """Category names by index, of a list or of a mapping of indices (numbers, or text that is one).

    Args:
        names: what a file holds.
        source: for messages.

    Raises:
        UserError: they are something else, or the indices are not 0, 1, 2, ...
    """
    if isinstance(names, Mapping):
        by_index = {_index(key, source): name for key, name in names.items()}
        if sorted(by_index) != list(range(len(names))):
            raise UserError(
                f"{source}: its category names are not numbered from 0 on without a gap: give "
                "each category one name"
            )
        names = [by_index[index] for index in range(len(names))]
    if not isinstance(names, list | tuple):
        raise UserError(f"{source}: its category names are {brief(names)}, not a list")
    if len(names) > MOST_CLASSES:
        raise UserError(f"{source}: has {len(names)} category names, over {MOST_CLASSES}")
    return [_name(name, source) for name in names]


def _index(key: Any, source: str) -> int:
    if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < MOST_CLASSES:
        return key
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 9:
        return int(key)
    raise UserError(f"{source}: numbers a category {brief(key)}, which is no number from 0 on")


def _name(name: Any, source: str) -> str:
    # YAML reads some names (1, 1.5, yes) as something else than text.
    if isinstance(name, str | int | float) and len(text := _text(name)) <= LONGEST_NAME:
        return text
    raise UserError(f"{source}: calls a category {brief(name)}, which is no name")


def _text(name: str | int | float) -> str:
    if isinstance(name, int) and name.bit_length() > 64:
        return brief(name)
    # Halves of pairs, which no file and no terminal takes.
    return str(name).encode("utf-8", "replace").decode()


def image_side(size: Any, source: str) -> int:
    """The side in pixels that a file states: a number, or one a side, of which the longer counts.

    Raises:
        UserError: it is none.
    """
    sides = list(size) if isinstance(size, list | tuple) and 1 <= len(size) <= 4 else [size]
    if all(type(side) in (int, float) and 1 <= side <= LARGEST_SIDE for side in sides):
        largest = max(sides)
        if largest == int(largest):
            return int(largest)
    raise UserError(
        f"{source}: was trained at an image size of {brief(size)}, which is none: from 1 to "
        f"{LARGEST_SIDE} pixels are possible"
    )


def require_names(names: Sequence[str], count: Any, source: str) -> None:
    """Refuse category names that are not one for each category of the head.

    Raises:
        UserError: they are more or fewer.
    """
    if count != len(names):
        raise UserError(
            f"{source} has {len(names)} category names and {brief(count)} categories: give both "
            "the same number"
        )


def stated(spec: Any, source: str) -> tuple[list[str], int, str]:
    """Names, image size and fingerprint of a description.

    Raises:
        UserError: one is missing or is none.
    """
    for key in ("names", "image_size", "fingerprint"):
        if key not in spec:
            raise UserError(f"the description of {source} is damaged (at '{key}')")
    fingerprint = spec["fingerprint"]
    if not isinstance(fingerprint, str) or len(fingerprint) > 200:
        raise UserError(f"the description of {source} is damaged (at 'fingerprint')")
    return listed_names(spec["names"], source), image_side(spec["image_size"], source), fingerprint


def source_of(spec: Any) -> str:
    """What a description says it came from, for messages."""
    source = spec.get("source", "the description")
    return source if isinstance(source, str) and len(source) < 1000 else "the description"

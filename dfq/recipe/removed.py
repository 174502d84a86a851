"""Keys that recipes had once: accepted with a warning for one release, and read over in records.

`REMOVED` is the whole list. A key that goes is added there; one of `synthesis`, which identifies
sets, to `synthesis.settings.FORMER`, from where it comes here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..runtime.distributed import is_main_process
from ..synthesis.settings import FORMER


@dataclass(frozen=True)
class Removed:
    """A key that there is no more.

    Attributes:
        why: what is so instead, in a few words.
        neutral: given its value and the whole recipe, whether the result is what it would be
            without the key.
    """

    why: str
    neutral: Callable[[Any, Mapping[str, Any]], bool]


def _value(recipe: Any, key: str, default: Any) -> Any:
    for part in key.split("."):
        if not isinstance(recipe, Mapping) or part not in recipe:
            return default
        recipe = recipe[part]
    return recipe


def _off(value: Any, recipe: Mapping[str, Any]) -> bool:
    return not value


REMOVED: dict[str, Removed] = {
    "distillation.drift": Removed(
        "trained weights have no bound",
        lambda value, recipe: not value or _value(recipe, "distillation.weight_lr", 0) == 0,
    ),
    "distillation.dampen": Removed("integers that stay as rounded do not oscillate", _off),
    "distillation.freeze": Removed("integers that stay as rounded do not oscillate", _off),
    "distillation.masks": Removed(
        "training follows synthesis.masks",
        lambda value, recipe: (
            value == _value(recipe, "synthesis.masks", "ellipse")
            or not _value(recipe, "distillation.weights.task", 0)
        ),
    ),
    "evaluation.batch_size": Removed("it is 16 images", lambda value, recipe: True),
    **{f"synthesis.{key}": Removed("it made no network better", _off) for key in FORMER},
}
"""By key, with dots."""


def _nearest(value: Any) -> Any:
    return "none" if value == "nearest" else value


RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "quantization.rounding": ("quantization.reconstruction", _nearest),
}
"""Keys that have another name now, and what their values are called under it."""


def present_name(key: str, value: Any, origin: str) -> tuple[str, Any]:
    """What a key and its value are called now; a line on standard error says so where they had
    other names.

    Args:
        key: with dots.
        value: its value.
        origin: what the line begins with.
    """
    if key not in RENAMED:
        return key, value
    present, change = RENAMED[key]
    if is_main_process():
        print(
            f"warning: {origin}: {key} is {present} now; the old name is read for one release",
            file=sys.stderr,
        )
    return present, change(value)


def under_present_names(data: dict[str, Any], origin: str | None = None) -> None:
    """Put values of keys that were renamed where they belong now; a value there has its way.

    Args:
        data: a recipe's sections, changed in place.
        origin: what a line on standard error begins with; None: nothing is said.
    """
    for key, (present, change) in RENAMED.items():
        section, name = _value(data, key.rpartition(".")[0], None), key.rpartition(".")[2]
        if isinstance(section, dict) and name in section:
            value = section.pop(name)
            value = change(value) if origin is None else present_name(key, value, origin)[1]
            section.setdefault(present.rpartition(".")[2], value)


def _places(data: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The removed keys that are in a recipe's sections: key, section and name in it."""
    for key in REMOVED:
        *above, name = key.split(".")
        section = _value(data, ".".join(above), None)
        if isinstance(section, dict) and name in section:
            yield key, section, name


def without_removed(data: dict[str, Any], *, neutral: bool = False) -> list[str]:
    """Take the keys out of a recipe's sections that there are no more.

    Args:
        data: the sections, changed in place.
        neutral: only those that changed nothing.

    Returns:
        The keys that were taken out.
    """
    removed = [
        (key, section, name)
        for key, section, name in _places(data)
        if not neutral or REMOVED[key].neutral(section[name], data)
    ]
    for _, section, name in removed:
        del section[name]
    return [key for key, _, _ in removed]


def removed_that_matter(data: Any) -> list[str]:
    """The keys of a record that there are no more and whose values changed the result."""
    return [
        key for key, section, name in _places(data) if not REMOVED[key].neutral(section[name], data)
    ]


def warn_of_removed(data: dict[str, Any], origin: str) -> None:
    """Take them out of a recipe that is to be used, and say so in one line on standard error.

    Args:
        data: the sections, changed in place.
        origin: what the line begins with.
    """
    removed = without_removed(data)
    if removed and is_main_process():
        keys = ", ".join(f"{key} ({REMOVED[key].why})" for key in removed)
        print(f"warning: {origin}: ignored, as removed: {keys}", file=sys.stderr)

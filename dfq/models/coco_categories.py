"""Category names: COCO's 80 classes with their ids of 1 to 90, and matching names across sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources

from ..errors import UserError, shown


def _canonical(name: str) -> str:
    """The spelling under which names of different sets meet: "TV monitor" and "tv" are one."""
    plain = "".join(name.casefold().split()).replace("_", "").replace("-", "")
    return _ALIASES.get(plain, plain)


# Pascal VOC's spellings that differ from COCO's by more than spaces.
_ALIASES = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tvmonitor": "tv",
}

_CATEGORIES: list[dict] = json.loads(
    resources.files(__package__).joinpath("coco_categories.json").read_text(encoding="utf-8")
)

COCO_NAMES: tuple[str, ...] = tuple(category["name"] for category in _CATEGORIES)
"""COCO's 80 detection categories, in the order in which detectors number them from 0."""

_IDS = {_canonical(category["name"]): int(category["id"]) for category in _CATEGORIES}


def coco_id(name: str) -> int | None:
    """COCO's own category id (1 to 90, with gaps) of a category name, or None if COCO has none.

    Case, spaces and Pascal VOC's spellings do not matter: `coco_id("TVmonitor") == 72`.
    """
    return _IDS.get(_canonical(name))


def match_names(
    set_names: Sequence[str],
    model_names: Sequence[str],
    where: str,
    *,
    by_position: bool = False,
) -> list[int | None]:
    """For each category of a set, the index of the model's category of that name.

    Names are compared exactly first, then without case, spaces and VOC's spellings. Positions
    count only where no name is shared, the set's are numbers ("0", "1", ...), and there are as many
    as the model has.

    Args:
        set_names: category names of the image set.
        model_names: category names of the detector, by index.
        where: what to call the set in the message.
        by_position: the set has no names: these are its numbers, to be compared with none.

    Returns:
        One model index, or None where the model has no such category, per entry of `set_names`.

    Raises:
        UserError: not one name is shared.
    """
    exact = {name: index for index, name in reversed(list(enumerate(model_names)))}
    loose = {_canonical(name): index for index, name in reversed(list(enumerate(model_names)))}
    mapping = [exact.get(name, loose.get(_canonical(name))) for name in set_names]
    numbers = all(name.strip().isdigit() for name in set_names)
    unknown = all(index is None for index in mapping)
    if numbers and (by_position or unknown) and len(set_names) == len(model_names):
        return list(range(len(model_names)))
    if by_position or unknown:
        raise UserError(
            f"{where}: no category name is shared with the model; the set has "
            f"{_beginning(set_names)}, the model has {_beginning(model_names)}"
        )
    return mapping


def _beginning(names: Sequence[str], count: int = 5) -> str:
    listed = ", ".join(shown(repr(str(name)), limit=60) for name in names[:count])
    return f"{listed}, ... ({len(names)} in all)" if len(names) > count else listed or "none"

"""Category names: COCO's 80 classes with their ids of 1 to 90, and matching names across sets."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
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

    Names are compared exactly first, then without case, spaces and VOC's spellings. Of categories
    of one name, the first is the first one's, the second the second one's. Positions count only
    where no name is shared, the set's are numbers ("0", "1", ...), and there are as many as the
    model has.

    Args:
        set_names: category names of the image set.
        model_names: category names of the detector, by index.
        where: what to call the set in the message.
        by_position: the set has no names: these are its numbers, to be compared with none.

    Returns:
        One model index, or None where the model has no such category, per entry of `set_names`.

    Raises:
        UserError: not one name is shared, or the model has several categories of one name, and the
            set another number of them.
    """
    exact = _matched(set_names, model_names, where)
    # What is left, by looser spellings.
    rest = [row for row, index in enumerate(exact) if index is None]
    spelled = [_canonical(set_names[row]) for row in rest]
    loose = dict(
        zip(rest, _matched(spelled, list(map(_canonical, model_names)), where), strict=True)
    )
    mapping = [loose[row] if index is None else index for row, index in enumerate(exact)]
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


def _matched(set_names: Sequence[str], model_names: Sequence[str], where: str) -> list[int | None]:
    """The model's category of the very name of each of a set's."""
    places = defaultdict(list)
    for index, name in enumerate(model_names):
        places[name].append(index)
    times = Counter(set_names)
    met: Counter[str] = Counter()
    mapping: list[int | None] = []
    for name in set_names:
        indices = places.get(name, [])
        if len(indices) > 1 and len(indices) != times[name]:
            raise UserError(
                f"{where}: has the category {shown(repr(name), limit=60)} {times[name]} times, and "
                f"the model {len(indices)} times: which is which cannot be told; give each of the "
                "model's a name of its own"
            )
        mapping.append(indices[met[name] if len(indices) > 1 else 0] if indices else None)
        met[name] += 1
    return mapping


def distinct_names(names: Sequence[str], indices: Iterable[int]) -> dict[int, str]:
    """A name for each of some categories that no other of them has: of those that share one, the
    index stands behind it.

    Args:
        names: of all categories, by index.
        indices: of those that are named.
    """
    times = Counter(names)
    return {
        index: names[index] if times[names[index]] == 1 else f"{names[index]} ({index})"
        for index in indices
    }


def _beginning(names: Sequence[str], count: int = 5) -> str:
    listed = ", ".join(shown(repr(str(name)), limit=60) for name in names[:count])
    return f"{listed}, ... ({len(names)} in all)" if len(names) > count else listed or "none"

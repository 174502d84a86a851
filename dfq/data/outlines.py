"""Outlines of objects as COCO writes them, polygons or run lengths, checked before pycocotools'
C code sees them: it trusts what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Segment = list[list[float]] | dict[str, Any]
"""COCO's polygons, or its run lengths (`size` and `counts`)."""

_LONGEST = 2**40
"""No run is longer than that many pixels."""


@dataclass(frozen=True)
class BrokenOutline:
    """Stands for an outline that cannot be used; `problem` says where it is and what is wrong."""

    problem: str


def outline(segmentation: Any, width: int, height: int) -> Segment | None:
    """The outline of an object; None where there is none (some tools write `[]`).

    Args:
        segmentation: what the file says.
        width, height: of the image, pixels.

    Raises:
        ValueError: it is broken.
    """
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        return _run_lengths(segmentation, width, height)
    if not isinstance(segmentation, list) or not all(_is_polygon(part) for part in segmentation):
        raise ValueError(
            "is neither a list of polygons x1 y1 x2 y2 ... nor run lengths with 'size' and 'counts'"
        )
    margin = max(width, height)
    for part in segmentation:
        # Its edges are walked along pixel by pixel.
        if not all(-margin <= value <= 2 * margin for value in part):
            raise ValueError("has a corner that is not finite or far out of the image")
    # Fewer than three corners enclose nothing, and pycocotools takes four numbers for a box.
    return [part for part in segmentation if len(part) >= 6] or None


def _is_polygon(part: Any) -> bool:
    numbers = isinstance(part, list) and all(type(value) in (int, float) for value in part)
    return numbers and len(part) % 2 == 0


def _run_lengths(segmentation: dict[str, Any], width: int, height: int) -> Segment:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(counts, str | list):
        raise ValueError(
            "is neither a list of polygons x1 y1 x2 y2 ... nor run lengths with 'size' and 'counts'"
        )
    if size != [height, width] or any(type(side) not in (int, float) for side in size):
        raise ValueError(
            f"has run lengths of the size {size!r}, but the image is {height} high and {width} wide"
        )
    runs = _decoded(counts) if isinstance(counts, str) else counts
    if not all(type(run) in (int, float) for run in runs):
        raise ValueError("has run lengths that are no numbers")
    # What must hold, and not what must not: NaN compares as neither.
    if not all(0 <= run <= _LONGEST and run == int(run) for run in runs):
        raise ValueError("has run lengths that are negative, too large or no whole numbers")
    if sum(runs) != width * height:
        raise ValueError(
            f"has run lengths of {sum(runs):.10g} pixels, but the image has {width * height}"
        )
    whole = counts if isinstance(counts, str) else [int(run) for run in counts]
    return {"size": [height, width], "counts": whole}


def _decoded(text: str) -> list[int]:
    """The numbers of COCO's compressed run lengths: six bits a character from "0" on, the lowest
    five of them a digit and the sixth set where more follow; signed, and from the fourth one on
    relative to the one but last."""
    values: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError("has compressed run lengths with characters that cannot be in them")
        value |= (code & 31) << shift
        shift += 5
        if value > _LONGEST or shift > 60:
            raise ValueError("has run lengths that are longer than any image")
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        values.append(value + (values[-2] if len(values) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("has compressed run lengths that are cut short")
    return values

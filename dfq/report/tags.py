"""Tags of boxes: their colours, and where each can be read."""

from __future__ import annotations

from collections.abc import Sequence

COLOURS = (
    *("#d7263d", "#1f6fd0", "#23862b", "#b8530f", "#8338ec"),
    *("#00798c", "#b5179e", "#6b6f00", "#7a4419", "#30425f"),
)
"""White text is legible on each; repeated in this order over the categories."""

Place = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""


def place_tag(
    box: Sequence[float],
    size: tuple[float, float],
    within: tuple[float, float],
    taken: Sequence[Place],
) -> Place:
    """Where the tag of a box covers no other tag, if there is such a place at the box's edges.

    Args:
        box: x1 y1 x2 y2 in pixels.
        size: width and height of the tag.
        within: width and height of the image.
        taken: places of other tags.
    """
    x1, y1, x2, y2 = map(float, box)
    width, height = size
    places = []
    for y in (y1 - height, y2, y1, y2 - height):
        for x in (x1, x2 - width):
            left = min(max(x, 0), within[0] - 1 - width)
            above = min(max(y, 0), within[1] - 1 - height)
            places.append((left, above, left + width, above + height))
    free = [one for one in places if not any(meet(one, other) for other in taken)]
    return (free or places)[0]


def meet(one: Place, other: Place) -> bool:
    """Whether two places have a pixel in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

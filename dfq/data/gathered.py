"""What readers of sets gather, image by image: `Gathered`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, shown
from .image_set import ImageSet, Item, make_item, usable
from .outlines import BrokenOutline, Segment

MAX_CATEGORIES = 100_000
"""Most categories that a set may have; more is a mistake, and costs memory."""


@dataclass
class Gathered:
    """The items of a set as a reader finds them, and what of their boxes is left out.

    Attributes:
        source: what the user named, for messages.
    """

    source: Path
    items: list[Item] = field(default_factory=list)
    dropped: int = 0
    first_dropped: str | None = None

    def add(
        self,
        path: Path,
        size: tuple[int, int],
        image_id: int,
        boxes: Sequence[Sequence[float]],
        labels: Sequence[int],
        where: Sequence[str],
        repeated: Sequence[int] = (),
        ignore: Sequence[bool] | None = None,
        area: Sequence[float | None] | None = None,
        segments: Sequence[Segment | BrokenOutline | None] | None = None,
    ) -> None:
        """Add an image.

        Args:
            path, size, image_id, boxes, labels, ignore, area, segments: as in `make_item`.
            where: file and row of each box, for messages.
            repeated: which boxes are there twice, and to be left out.
        """
        corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        corners[list(repeated)] = np.nan
        lost = np.flatnonzero(~usable(corners))
        if len(lost):
            self.first_dropped = self.first_dropped or where[int(lost[0])]
        item, _ = make_item(path, size, image_id, corners.tolist(), labels, ignore, area, segments)
        self.items.append(item)
        self.dropped += len(lost)

    def image_set(self, names: list[str], **more: Any) -> ImageSet:
        """The set; `more` are further fields of it.

        Raises:
            UserError: there are no images, or too many categories.
        """
        if len(names) > MAX_CATEGORIES:
            raise UserError(
                f"{shown(self.source)}: {len(names)} categories; {MAX_CATEGORIES} are the most"
            )
        return ImageSet(
            self.source,
            names,
            self.items,
            dropped=self.dropped,
            first_dropped=self.first_dropped,
            **more,
        )

"""What several tests take: of `test_masks` and others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dfq.data.readers import ImageSet
from dfq.models.base import Detections
from support.coco_parts import FakeDetector, image_set

BOX = [20.0, 10.0, 60.0, 50.0]
"""In a 200 x 100 image."""


def outlined(*objects: tuple[list[float], list[list[float]] | None]) -> ImageSet:
    """One 200 x 100 image of cats with outlines."""
    data = image_set([(box, 0, False) for box, _ in objects])
    return replace(
        data, items=[replace(data.items[0], segments=tuple(outline for _, outline in objects))]
    )


class Segmenting(FakeDetector):
    """Gives all detections the same mask: the left half."""

    @property
    def has_masks(self) -> bool:
        return True

    def segment(self, raw: Any, detections: Any) -> list[Detections]:
        half = torch.zeros(28, 28)
        half[:, :14] = 1
        return [replace(one, masks=half.expand(len(one), 28, 28)) for one in detections]

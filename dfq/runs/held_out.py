"""Images of a set that are held out, to look at when all is done."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..data.calibration_set import CalibrationSet
from ..data.pixels import LabelledImages

MOST_HELD_OUT = 16
"""So many images of a calibration set are held out at most, and no more than an eighth of it: some
hundred objects, and what is made of the others hardly misses them."""


@dataclass(frozen=True)
class Looked:
    """Synthetic images to look at when all is done.

    Attributes:
        data: where they are.
        indices: which.
        held_out: whether the low-bit network was made without them.
    """

    data: LabelledImages
    indices: list[int]
    held_out: bool

    @property
    def where(self) -> str:
        synthetic = isinstance(self.data, CalibrationSet)
        if self.held_out:
            return f"{len(self.indices)} held-out synthetic images"
        return (
            f"{len(self.indices)} of the {'synthetic ' if synthetic else ''}images it was made on"
        )


def hold_out(data: LabelledImages) -> tuple[LabelledImages, Looked]:
    """What of a set to calibrate and train on, and what to look at in the end.

    The last images of a calibration set are held out; of a set of fewer than 8 images, and of a
    real one, which may be all that its owner has, none are.
    """
    n = len(data)
    count = count_held_out(n) if isinstance(data, CalibrationSet) else 0
    if not count or not isinstance(data, CalibrationSet):
        return data, Looked(data, list(range(min(MOST_HELD_OUT, n))), held_out=False)
    rest = replace(
        data,
        files=data.files[:-count],
        labels=data.labels[:-count],
        scores=data.scores[:-count],
    )
    return rest, Looked(data, list(range(n - count, n)), held_out=True)


def count_held_out(images: int) -> int:
    """How many of the images of a calibration set are held out."""
    return min(MOST_HELD_OUT, images // 8)

"""What calibration and training need of a set."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..models.base import Targets


class Pixels(Protocol):
    """Images all of one size, without their labels."""

    def __len__(self) -> int: ...

    def load(self, indices: list[int]) -> Tensor:
        """uint8 `(n, 3, h, w)`, RGB."""


class LabelledImages(Protocol):
    """What the trainer needs of a set: images all of one size, and their labels."""

    def __len__(self) -> int: ...

    def load(self, indices: list[int]) -> Tensor:
        """uint8 `(n, 3, h, w)`."""

    def targets(self, indices: list[int]) -> Targets: ...

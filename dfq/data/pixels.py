"""What calibration needs of a set."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Pixels(Protocol):
    """Images all of one size, without their labels."""

    def __len__(self) -> int: ...

    def load(self, indices: list[int]) -> Tensor:
        """uint8 `(n, 3, h, w)`, RGB."""

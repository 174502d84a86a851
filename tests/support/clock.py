"""A clock that tests set."""

from __future__ import annotations


class Clock:
    """Stands for `time.monotonic`.

    Attributes:
        now: what it says, seconds.
    """

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

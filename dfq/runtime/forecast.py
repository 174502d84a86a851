"""How long work of several phases takes in all: said at its start, and again as its phases end."""

from __future__ import annotations

from collections.abc import Sequence

LONG_SECONDS = 60.0
"""Work that takes longer says at its start how long it will take."""

Phase = tuple[str, Sequence[float] | None]
"""The name of a task, and the seconds that each of its units is expected to take; None: not known
before it runs."""


def duration(seconds: float) -> str:
    """As "0:20", "18:00" or "3:10:00"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Forecast:
    """The phases of some work that are still to come, and how long they are expected to take.

    Args:
        work: what it is called.
        phases: in their order; a name may come several times.
        advice: what would make it shorter; empty: nothing is known of that.
    """

    def __init__(self, work: str, phases: Sequence[Phase], advice: str = "") -> None:
        self.work, self.advice = work, advice
        self._ahead = list(phases)
        self._now: Phase = ("", None)
        self._told = False

    def begin(self, task: str) -> bool:
        """A task begins; says whether it is one of the phases. Those before it, which a run that
        goes on has behind it, are over."""
        kinds = [_kind(name) for name, _ in self._ahead]
        if _kind(task) not in kinds:
            return False
        place = kinds.index(_kind(task))
        self._now = self._ahead[place]
        del self._ahead[: place + 1]
        return True

    @property
    def units(self) -> Sequence[float] | None:
        """Seconds of each unit of the phase that began last, as they were expected."""
        return self._now[1]

    def ahead(self) -> float | None:
        """Seconds of the phases after that one; None while one of them is unknown."""
        total = 0.0
        for _, seconds in self._ahead:
            if seconds is None:
                return None
            total += sum(seconds)
        return total

    def announcement(self, left: float | None) -> str:
        """How long all of it takes and what would make it shorter, in a line each: once, as soon as
        it is known, and where it is long; else nothing.

        Args:
            left: seconds of the present phase that are left, as far as they are known.
        """
        ahead = self.ahead()
        if self._told or left is None or ahead is None:
            return ""
        self._told = True
        if left + ahead < LONG_SECONDS:
            return ""
        text = f"{self.work}: about {duration(left + ahead)}: {self._parts((self._now[0], left))}"
        return f"{text}\n{self.work}: {self.advice}" if self.advice else text

    def end(self) -> str:
        """The present phase is over: how long the others will take, where that is long."""
        self._now = ("", None)
        ahead = self.ahead()
        if not self._told or ahead is None or ahead < LONG_SECONDS:
            return ""
        return f"{self.work}: about {duration(ahead)} left: {self._parts()}"

    def _parts(self, *first: tuple[str, float]) -> str:
        """Seconds by phase; those that differ in what stands in parentheses are one."""
        seconds: dict[str, float] = {}
        ahead = [(name, sum(units or ())) for name, units in self._ahead]
        for name, part in (*first, *ahead):
            seconds[_kind(name)] = seconds.get(_kind(name), 0.0) + part
        return ", ".join(f"{kind} {duration(part)}" for kind, part in seconds.items())


def _kind(task: str) -> str:
    """The name of a task without what stands in parentheses, which says what it is done to."""
    return task.partition(" (")[0]

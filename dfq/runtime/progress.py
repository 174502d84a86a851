"""Progress for people: one live line with rate and time left, or plain lines in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from .forecast import LONG_SECONDS, Forecast, Phase, duration

PLAIN_SECONDS = 15.0
"""Without a terminal, a line at most so often."""

_SURE_SECONDS = 3.0
"""A rate that was watched for less is not spoken of: the first steps are slower than others."""

_MEMORY_SECONDS = 30.0
"""Half of what a rate is made of is younger than that, or than a quarter of the work so far."""


class Task(Protocol):
    """One piece of long work."""

    def update(self, done: int, total: int) -> None:
        """So many units of it are done."""

    def within(self, share: float) -> None:
        """So much of the unit that comes next is done, 0 to 1."""

    def left(self, seconds: float) -> None:
        """How long it will still take, where the work knows better than its rate."""

    def detail(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        """What goes on within a unit."""


class Progress(Protocol):
    """Where long work reports to."""

    def task(self, name: str, total: int, unit: str) -> contextlib.AbstractContextManager[Task]:
        """Begin a piece of work; the context ends it."""

    def note(self, text: str) -> None:
        """Something to know, in a line."""


class Silent:
    """Reports to nobody."""

    def update(self, done: int, total: int) -> None: ...

    def within(self, share: float) -> None: ...

    def left(self, seconds: float) -> None: ...

    def detail(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None: ...

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str) -> Iterator[Task]:
        yield self

    def note(self, text: str) -> None: ...


class _Rate:
    """Units per second since the first report, the last ones counting most; what was done before
    it is not counted. Shares of a unit count, so that it is known before the first one is done."""

    def __init__(self) -> None:
        self.at = time.monotonic()
        self.started = self.at
        self.done: float | None = None
        self._units = 0.0
        self._seconds = 0.0
        self._left: tuple[float, float] | None = None

    def reach(self, done: float) -> None:
        """So much is done now."""
        now = time.monotonic()
        if self.done is None:
            self.done = done
        elif done > self.done:
            # Work that reports once an hour is averaged over hours.
            memory = max(_MEMORY_SECONDS, (now - self.started) / 4)
            decay = 0.5 ** ((now - self.at) / memory)
            self._units = decay * self._units + done - self.done
            self._seconds = decay * self._seconds + now - self.at
            self.at, self.done = now, done

    def tell(self, left: float) -> None:
        """The work itself says how many seconds are left."""
        self._left = (time.monotonic(), left)

    def left(self, total: float) -> float | None:
        """Seconds to the end; None while nothing is known of it."""
        if self.done is None or self.done >= total:
            return None if self.done is None else 0.0
        if self._left is not None:
            told_at, left = self._left
            return max(0.0, left - (time.monotonic() - told_at))
        if self._units <= 0 or self._seconds <= 0:
            return None
        return (total - self.done) * self._seconds / self._units

    @property
    def sure(self) -> bool:
        """Whether what `left` says can be relied on."""
        return self._left is not None or self._seconds >= _SURE_SECONDS

    @property
    def speed(self) -> float | None:
        """Units a second; None while nothing is known of it."""
        return self._units / self._seconds if self._units > 0 and self._seconds > 0 else None


class _Task(ABC):
    """What tasks on a terminal and in a log have in common: how far they are, and how long yet."""

    def __init__(
        self, name: str, total: int, unit: str, advice: str = "", forecast: Forecast | None = None
    ) -> None:
        self.advice, self.forecast = advice, forecast
        self.name, self.total, self.unit = name, total, unit
        self.rate = _Rate()
        self.done = 0
        self._announced = False
        # Seconds that each unit is expected to take; and up to each and the end, which is how much
        # work there is.
        self._units = forecast.units if forecast else None
        self._work: list[float] | None = None

    def update(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        units = self._units
        if units and len(units) != total:
            units = [sum(units) / total] * total if total else None
        self._work = [0.0, *accumulate(units)] if units else None
        self.rate.reach(self._reached(done))
        self.show(done == total)

    def within(self, share: float) -> None:
        self.rate.reach(self._reached(self.done, share))
        self.show(False)

    def left(self, seconds: float) -> None:
        self.rate.tell(seconds)
        self.show(False)

    def detail(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        shown = " ".join(f"{name} {value:.3g}" for name, value in values.items())
        self.show(False, f"{stage} {step}/{steps} {shown}")

    @abstractmethod
    def show(self, last: bool, detail: str = "") -> None:
        """Show how far it is, if it is time to."""

    def _reached(self, done: int, share: float = 0.0) -> float:
        """How much is done: units, or the seconds that they were expected to take."""
        if self._work is None:
            return done + share
        following = self._work[min(done + 1, self.total)]
        return self._work[done] + share * (following - self._work[done])

    def _seconds_left(self) -> float | None:
        """To the end of the task; None while nothing is known of it."""
        left = self.rate.left(self._reached(self.total))
        if self._work is None or self.rate.sure or left == 0:
            return left
        return self._work[-1] - (self.rate.done or 0.0)

    def text(self) -> str:
        """Rate and time left, as far as they are known."""
        parts, speed = [], self.rate.speed
        if speed is not None and self.total:
            rate = speed * self.total / self._reached(self.total)
            parts.append(
                f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{rate * 60:.1f} {self.unit}/min"
            )
        left = self._seconds_left()
        if left is not None and (parts or self.rate.sure):
            parts.append(f"{duration(left)} left")
            ahead = self.forecast.ahead() if self.forecast else None
            if ahead:
                parts.append(f"{duration(left + ahead)} in all")
        return ", ".join(parts)

    def announcement(self) -> str:
        """How long the work will take, once it is known and if it is long, and what would make it
        shorter, in a line each; else nothing."""
        left = self._seconds_left()
        sure = self.rate.sure or self._work is not None
        if self.forecast is not None:
            return self.forecast.announcement(left if sure else None)
        if self._announced or not left or not sure:
            return ""
        self._announced = True
        if left < LONG_SECONDS:
            return ""
        text = f"{self.name}: about {duration(left)} for {self.total - self.done} {self.unit}"
        return f"{text}\n{self.name}: {self.advice}" if self.advice else text


class _PlainTask(_Task):
    def __init__(
        self, name: str, total: int, unit: str, advice: str = "", forecast: Forecast | None = None
    ) -> None:
        super().__init__(name, total, unit, advice, forecast)
        self.printed = time.monotonic()

    def show(self, last: bool, detail: str = "") -> None:
        announcement = self.announcement()
        due = last or time.monotonic() - self.printed > PLAIN_SECONDS
        # What a line says anyway of a task alone.
        if announcement and (self.forecast is not None or not due):
            print(announcement, file=sys.stderr, flush=True)
        if due:
            parts = [f"{self.name}: {self.done}/{self.total} {self.unit}", self.text(), detail]
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)
            self.printed = time.monotonic()


class _BarTask(_Task):
    def __init__(
        self,
        bar: Bar,
        name: str,
        total: int,
        unit: str,
        advice: str = "",
        forecast: Forecast | None = None,
    ) -> None:
        super().__init__(name, total, unit, advice, forecast)
        self.bar = bar
        self.id = bar.add_task(name, total=total, rate="", detail="")

    def show(self, last: bool, detail: str = "") -> None:
        announcement = self.announcement()
        if announcement:
            self.bar.console.print(announcement, highlight=False, markup=False)
        self.bar.update(self.id, completed=self.done, total=self.total, rate=self.text())
        if detail:
            self.bar.update(self.id, detail=detail)


class Live:
    """Reports on standard error: a live bar on a terminal, a line now and then elsewhere.

    Args:
        advises: whether it also tells what would make long work shorter.
    """

    def __init__(self, *, advises: bool = True) -> None:
        self.advises = advises
        self._bar: Bar | None = None
        # By the name of a task, what would make it shorter.
        self.advice: dict[str, str] = {}
        # Of the work that tasks are phases of.
        self.forecast: Forecast | None = None

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str) -> Iterator[Task]:
        forecast = self.forecast if self.forecast and self.forecast.begin(name) else None
        with self._task(name, total, unit, forecast) as task:
            yield task
        # Not of what failed.
        if forecast is not None and (said := forecast.end()):
            self.note(said)

    @contextlib.contextmanager
    def _task(self, name: str, total: int, unit: str, forecast: Forecast | None) -> Iterator[Task]:
        console, advice = Console(stderr=True), self.advice.get(name, "")
        if not console.is_terminal:
            yield _PlainTask(name, total, unit, advice, forecast)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("[dim]{task.fields[detail]}"),
        )
        with Bar(*columns, console=console) as bar:
            self._bar = bar
            try:
                yield _BarTask(bar, name, total, unit, advice, forecast)
            finally:
                self._bar = None

    def note(self, text: str) -> None:
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            # Above the bar, which is drawn anew below.
            self._bar.console.print(text, highlight=False, markup=False)


def advise(progress: Progress, task: str, text: str) -> None:
    """Have a line told after the estimate of the tasks of a name, where they are long."""
    if isinstance(progress, Live) and progress.advises:
        progress.advice[task] = text


@contextlib.contextmanager
def forecast(
    progress: Progress, work: str, phases: Callable[[], Sequence[Phase]], advice: str = ""
) -> Iterator[None]:
    """Have the tasks within the context told as phases of one work, where somebody is told at all
    and they are not phases of other work already.

    Args:
        progress: whom to tell.
        work: what it is called.
        phases: gives them and how long they will take, for which it may time a few things.
        advice: what would make it shorter.
    """
    if not isinstance(progress, Live) or progress.forecast is not None:
        yield
        return
    try:
        foreseen = phases()
    except Exception:  # whatever a network does with noise: an estimate is not worth a run
        yield
        return
    progress.forecast = Forecast(work, foreseen, advice if progress.advises else "")
    try:
        yield
    finally:
        progress.forecast = None

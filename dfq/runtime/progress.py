"""Progress for people: one live line with rate and time left, or plain lines in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

PLAIN_SECONDS = 15.0
"""Without a terminal, a line at most so often."""

LONG_SECONDS = 60.0
"""Work that takes longer says at its start how long it will take."""

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


def duration(seconds: float) -> str:
    """As "0:20", "18:00" or "3:10:00"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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

    def text(self, total: int, unit: str) -> str:
        """Rate and time left, as far as they are known."""
        left, parts = self.left(total), []
        if self._units > 0 and self._seconds > 0:
            rate = self._units / self._seconds
            per = f"{rate:.1f} {unit}/s" if rate >= 1 else f"{rate * 60:.1f} {unit}/min"
            parts.append(per)
        if left is not None and (parts or self._left is not None):
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)


class _Task(ABC):
    """What tasks on a terminal and in a log have in common: how far they are, and how long yet."""

    def __init__(self, name: str, total: int, unit: str, advice: str = "") -> None:
        self.advice = advice
        self.name, self.total, self.unit = name, total, unit
        self.rate = _Rate()
        self.done = 0
        self._announced = False

    def update(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.rate.reach(done)
        self.show(done == total)

    def within(self, share: float) -> None:
        self.rate.reach(self.done + share)
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

    def announcement(self) -> str:
        """How long the work will take, once it is known and if it is long, and what would make it
        shorter, in a line each; else nothing."""
        left = self.rate.left(self.total)
        if self._announced or not left or not self.rate.sure:
            return ""
        self._announced = True
        if left < LONG_SECONDS:
            return ""
        text = f"{self.name}: about {duration(left)} for {self.total - self.done} {self.unit}"
        return f"{text}\n{self.name}: {self.advice}" if self.advice else text


class _PlainTask(_Task):
    def __init__(self, name: str, total: int, unit: str, advice: str = "") -> None:
        super().__init__(name, total, unit, advice)
        self.printed = time.monotonic()

    def show(self, last: bool, detail: str = "") -> None:
        announcement = self.announcement()
        if last or time.monotonic() - self.printed > PLAIN_SECONDS:
            rate = self.rate.text(self.total, self.unit)
            parts = [f"{self.name}: {self.done}/{self.total} {self.unit}", rate, detail]
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)
            self.printed = time.monotonic()
        elif announcement:
            print(announcement, file=sys.stderr, flush=True)


class _BarTask(_Task):
    def __init__(self, bar: Bar, name: str, total: int, unit: str, advice: str = "") -> None:
        super().__init__(name, total, unit, advice)
        self.bar = bar
        self.id = bar.add_task(name, total=total, rate="", detail="")

    def show(self, last: bool, detail: str = "") -> None:
        announcement = self.announcement()
        if announcement:
            self.bar.console.print(announcement, highlight=False, markup=False)
        rate = self.rate.text(self.total, self.unit)
        self.bar.update(self.id, completed=self.done, total=self.total, rate=rate)
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

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str) -> Iterator[Task]:
        console, advice = Console(stderr=True), self.advice.get(name, "")
        if not console.is_terminal:
            yield _PlainTask(name, total, unit, advice)
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
                yield _BarTask(bar, name, total, unit, advice)
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

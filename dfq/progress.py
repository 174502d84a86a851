"""Progress for people: one live line with rate and time left, or plain lines in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

PLAIN_SECONDS = 15.0
"""Without a terminal, a line at most so often."""


class Task(Protocol):
    """One piece of long work."""

    def update(self, done: int, total: int) -> None:
        """So many units of it are done."""

    def detail(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        """What goes on within a unit."""


class Progress(Protocol):
    """Where long work reports to."""

    def task(self, name: str, total: int, unit: str) -> contextlib.AbstractContextManager[Task]:
        """Begin a piece of work; the context ends it."""


class Silent:
    """Reports to nobody."""

    def update(self, done: int, total: int) -> None: ...

    def detail(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None: ...

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str) -> Iterator[Task]:
        yield self


class _Rate:
    """Units per second since the first report; what was done before it is not counted."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first: int | None = None

    def text(self, done: int, total: int, unit: str) -> str:
        if self.first is None:
            self.first = done
        seconds = time.monotonic() - self.started
        fresh = done - self.first
        if not fresh or seconds <= 0:
            return ""
        rate = fresh / seconds
        per = f"{rate:.1f} {unit}/s" if rate >= 1 else f"{rate * 60:.1f} {unit}/min"
        left = (total - done) / rate
        minutes, rest = divmod(round(left), 60)
        return f"{per}, {minutes}:{rest:02d} left"


class _PlainTask:
    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.rate = _Rate()
        self.done = 0
        self.printed = time.monotonic()

    def _line(self, more: str = "") -> None:
        rate = self.rate.text(self.done, self.total, self.unit)
        parts = [f"{self.name}: {self.done}/{self.total} {self.unit}", rate, more]
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)
        self.printed = time.monotonic()

    def update(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.rate.text(done, total, self.unit)
        if done == total or time.monotonic() - self.printed > PLAIN_SECONDS:
            self._line()

    def detail(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        if time.monotonic() - self.printed > PLAIN_SECONDS:
            self._line(_describe(stage, step, steps, values))


class _BarTask:
    def __init__(self, bar: Bar, name: str, total: int, unit: str) -> None:
        self.bar, self.unit = bar, unit
        self.total = total
        self.rate = _Rate()
        self.id = bar.add_task(name, total=total, rate="", detail="")

    def update(self, done: int, total: int) -> None:
        rate = self.rate.text(done, total, self.unit)
        self.total = total
        self.bar.update(self.id, completed=done, total=total, rate=rate)

    def detail(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        self.bar.update(self.id, detail=_describe(stage, step, steps, values))


def _describe(stage: str, step: int, steps: int, values: dict[str, float]) -> str:
    shown = " ".join(f"{name} {value:.3g}" for name, value in values.items())
    return f"{stage} {step}/{steps} {shown}"


class Live:
    """Reports on standard error: a live bar on a terminal, a line now and then elsewhere."""

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str) -> Iterator[Task]:
        console = Console(stderr=True)
        if not console.is_terminal:
            yield _PlainTask(name, total, unit)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("[dim]{task.fields[detail]}"),
        )
        with Bar(*columns, console=console) as bar:
            yield _BarTask(bar, name, total, unit)

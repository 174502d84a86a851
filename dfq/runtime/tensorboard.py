"""Loss curves for TensorBoard."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import require_output_folder, user_path
from .progress import Progress, Task

_OPEN = 16 + (os.cpu_count() or 1)
"""Runs whose files are kept open, more than are at work at a time; with more still, the one that
was quiet the longest is closed."""


class Curves:
    """Writes the terms of a loss: TensorBoard runs, in them a chart for each stage and term.

    Args:
        folder: where TensorBoard looks; made if missing.
        goes_on: what was interrupted goes on where it was, and its first curves stay; else it
            begins anew, and they are hidden.

    Raises:
        UserError: where TensorBoard is not installed or the folder cannot be one.
    """

    def __init__(self, folder: Path, *, goes_on: bool = False) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "--tensorboard: TensorBoard is not installed; pip install 'dfq[tensorboard]'"
            ) from None
        folder = user_path(folder, "--tensorboard")
        require_output_folder(folder, "tensorboard")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._writer, self._goes_on = folder, SummaryWriter, goes_on
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._seen: set[str] = set()

    def add(self, run: str, stage: str, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve of a run's stage.

        Args:
            run: a shard of synthesis, for example.
            stage: of the work; terms of several stages are charts of their own.
            step: iteration within the stage.
            values: the terms.
        """
        if run not in self._open:
            if len(self._open) >= _OPEN:
                self._open.popitem(last=False)[1].close()
            # What was interrupted begins anew, or goes on from a step before its last: curves of
            # the first attempt are hidden from there on.
            purge = None if run in self._seen else (step if self._goes_on else 0)
            self._open[run] = self._writer(str(self.folder / run), purge_step=purge)
            self._seen.add(run)
        self._open.move_to_end(run)
        for name, value in values.items():
            self._open[run].add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        """Write out what is not yet on disk."""
        while self._open:
            self._open.popitem()[1].close()


class WithCurves:
    """Passes reports on, and adds the terms of the training's loss to curves.

    Args:
        progress: whom to pass them on to.
        curves: where they are added, one point an epoch.
    """

    def __init__(self, progress: Progress, curves: Curves) -> None:
        self.progress, self.curves = progress, curves

    def note(self, text: str) -> None:
        self.progress.note(text)

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str) -> Iterator[Task]:
        with self.progress.task(name, total, unit) as task:
            yield _WithCurves(task, name, self.curves)


class _WithCurves:
    def __init__(self, task: Task, name: str, curves: Curves) -> None:
        self.task, self.name, self.curves = task, name, curves

    def update(self, done: int, total: int) -> None:
        self.task.update(done, total)

    def within(self, share: float) -> None:
        self.task.within(share)

    def left(self, seconds: float) -> None:
        self.task.left(seconds)

    def detail(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        self.curves.add(self.name, stage, step, values)
        self.task.detail(stage, step, steps, values)

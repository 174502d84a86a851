"""Loss curves for TensorBoard."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from .errors import UserError

_OPEN = 16 + (os.cpu_count() or 1)
"""Runs whose files are kept open, more than are at work at a time; with more still, the one that
was quiet the longest is closed."""


class Curves:
    """Writes the terms of a loss: TensorBoard runs, in them a chart for each stage and term.

    Args:
        folder: where TensorBoard looks; made if missing.

    Raises:
        UserError: where TensorBoard is not installed or the folder cannot be one.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "--tensorboard: TensorBoard is not installed; pip install 'dfq[tensorboard]'"
            ) from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--tensorboard {folder}: a file is in the way") from None
        self.folder, self._writer = folder, SummaryWriter
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
            # What was interrupted begins anew: the curves of its first attempt are hidden.
            purge = None if run in self._seen else 0
            self._open[run] = self._writer(str(self.folder / run), purge_step=purge)
            self._seen.add(run)
        self._open.move_to_end(run)
        for name, value in values.items():
            self._open[run].add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        """Write out what is not yet on disk."""
        while self._open:
            self._open.popitem()[1].close()

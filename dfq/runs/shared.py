"""A run folder as all processes of a job see it: the leading one writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .folder import Run


@dataclass(frozen=True)
class SharedRun:
    """A run in this process.

    Attributes:
        folder: of the run, the same in all processes.
        finished: whether it was complete when the job began.
        writable: the run to write to; None in a process that does not lead.
    """

    folder: Path
    finished: bool
    writable: Run | None

    def log(self, text: str) -> None:
        """Append a line to the run's log, once."""
        if self.writable is not None:
            self.writable.log(text)

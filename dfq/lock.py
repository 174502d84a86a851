"""One process at a time in a folder: `locked`."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Hold `folder` for this process alone within the block.

    The kernel holds the lock (flock) and drops it with the process, so one that was killed is no
    obstacle to the next, though its `.lock` file stays.

    Args:
        folder: exists already.
        refusal: what to say where another process holds it.

    Raises:
        UserError: saying `refusal`.
    """
    path = folder / LOCK
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(refusal) from None
        # The one before may have removed the file between our opening and our locking it.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()

"""One process at a time in a folder: `locked`."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import UserError

LOCK = ".lock"

_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""Of a link, a folder and a pipe in the place of the lock."""


def _opener(path: str, flags: int) -> int:
    # Neither through a link nor waiting for the other end of a pipe.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


@contextlib.contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Hold `folder` for this process alone within the block.

    The kernel holds the lock (flock) and drops it with the process, so one that was killed is no
    obstacle to the next, though its `.lock` file stays.

    Args:
        folder: exists already.
        refusal: what to say where another process holds it.

    Raises:
        UserError: saying `refusal`, or that something else is in the lock's place.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        while True:
            try:
                file = stack.enter_context(open(path, "a", opener=_opener))
            except OSError as error:
                if error.errno not in _NO_FILE:
                    raise
                raise UserError(f"{path}: is in the way of the lock; delete it") from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(refusal) from None
            # The one before may have removed the file between our opening and our locking it.
            if _is_there(file, path):
                break
        stack.callback(path.unlink, missing_ok=True)
        yield


def _is_there(file: IO[Any], path: Path) -> bool:
    """Whether the open `file` is the one at `path` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

"""One process at a time in a folder: `locked`."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

LOCK = ".lock"

# Neither through a link nor waiting for the other end of a pipe that somebody put there.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


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
    while True:
        try:
            file = os.open(path, _FLAGS, 0o666)
        except OSError:
            if path.is_symlink() or path.is_dir():
                raise UserError(f"{path}: something is in the way of the lock; delete it") from None
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before may have removed the file between our opening and our locking it.
            if _is_there(file, path):
                break
        except BlockingIOError:
            os.close(file)
            raise UserError(refusal) from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _is_there(file: int, path: Path) -> bool:
    """Whether the open `file` is the one at `path` now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False

"""One process at a time in a folder: `locked`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from ..errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Hold `folder` for this process alone within the block.

    The kernel holds the lock (`filelock`) and drops it with the process, so one that was killed is
    no obstacle to the next, though its `.lock` file stays.

    Args:
        folder: exists already.
        refusal: what to say where another process holds it.

    Raises:
        UserError: saying `refusal`, or that something else is in the lock's place.
    """
    path = folder / LOCK
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: is in the way of the lock; delete it")
    lock = filelock.FileLock(path, timeout=0)
    while not lock.is_locked:
        try:
            lock.acquire()
        except filelock.Timeout:
            # The one before may have removed the file between our opening and our locking it.
            if path.exists():
                raise UserError(refusal) from None
    try:
        yield
    finally:
        # While it is held: who finds no file makes one, and who has this one open takes another.
        path.unlink(missing_ok=True)
        lock.release()


def sweep_lock(folder: Path) -> None:
    """Do away with the `.lock` of a process that was killed when all was done; one that is held
    stays, and so does one in a folder that cannot be written to."""
    if (folder / LOCK).exists():
        # Who lets go of it removes it.
        with contextlib.suppress(UserError, OSError), locked(folder, ""):
            pass

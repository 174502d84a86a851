"""Files and folders on their way to their names.

Who writes one holds it: the kernel drops the lock (`flock`) with the process, so what a killed one
left is told from what another still writes, and is swept away by whoever comes next.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

NAME_BYTES = 255
"""The longest name of a file that file systems take."""


def short_name(text: str, limit: int = 80) -> str:
    """A text as part of a file's name, cut to `limit` bytes."""
    return os.fsencode(text)[:limit].decode("utf-8", "ignore")


@contextlib.contextmanager
def naming_file(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Within this context an error of the system has the name of the file, which those of writing
    (the disk is full) have not.

    Args:
        path: the file, or folder.
        temporary: what it is called until it is finished, which nobody asked for.
    """
    try:
        yield
    except OSError as error:
        about = error.filename
        ours = isinstance(about, str) and temporary is not None and str(temporary) in about
        if error.errno is not None and (about is None or ours):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def unfinished_file(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, which takes its place, synced, when the block ends well, and is
    gone otherwise. A second writer of the same waits for the first.

    Raises:
        OSError: with the name of `path`.
    """
    temporary = _temporary(path)
    with naming_file(path, temporary), os.fdopen(_claim(temporary), "wb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def unfinished_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent`, for what is to be there under `name`: to move it, or what is in it,
    is the caller's. What is left of it is gone when the block ends; so is what processes left that
    were killed in such a block."""
    prefix = f".{short_name(name)}.dfq-"
    for left in [path for path in parent.iterdir() if path.name.startswith(prefix)]:
        descriptor = _held(left)
        if descriptor is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
    descriptor = None
    while descriptor is None:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        folder.mkdir()
        # None: another process took it for one that was left.
        descriptor = _held(folder, without_locks=True)
    try:
        with naming_file(parent / name, folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    name = f".{path.name}.tmp"
    if len(os.fsencode(name)) > NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.tmp"
    return path.with_name(name)


def _claim(temporary: Path) -> int:
    """A new file of this name, open for writing and held."""
    while True:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o666)
        except FileExistsError:
            _sweep(temporary)
            continue
        _lock(descriptor)
        if _is_at(descriptor, temporary):
            return descriptor
        # Another writer took it for one that a killed process left.
        os.close(descriptor)


def _sweep(temporary: Path) -> None:
    """Remove a file of another writer, once that is done or where it was killed."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(temporary, flags)
    except OSError:
        # A link, which is not followed, or what may not be read.
        temporary.unlink(missing_ok=True)
        return
    try:
        _lock(descriptor)
        if _is_at(descriptor, temporary):
            temporary.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _held(folder: Path, *, without_locks: bool = False) -> int | None:
    """A descriptor that holds a folder; None where another process does, or it is none.

    Args:
        folder: to hold.
        without_locks: what to take for an answer where the file system has no locks.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(folder, flags)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except BlockingIOError:
        held = False
    except OSError:
        held = without_locks
    if held and _is_at(descriptor, folder):
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int) -> None:
    """Wait for the file, where the file system has locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether what is open still has this name."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return not stat.S_ISLNK(status.st_mode) and os.path.samestat(os.fstat(descriptor), status)

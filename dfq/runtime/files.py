"""Files that are written whole or not at all, and the places where they may be written.

Nothing is written through a link: a whole file takes the place of what had its name, and what it
is first written to is always new.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, argument, shown
from .label_sets import label_set
from .unfinished import NAME_BYTES, unfinished_file

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"})
"""Name endings (lower case) by which files of a folder count as images."""

# Of files that are read where a folder is named: all that sets and runs consist of.
_READ_SUFFIXES = IMAGE_SUFFIXES | {".txt", ".xml", ".yaml", ".yml", ".pt", ".safetensors"}
_READ_NAMES = frozenset(
    {"annotations.json", "manifest.json", "metrics.json", "sensitivity.json", "state.json"}
)

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.EEXIST: "something is in the way",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "links that lead in a circle, or a link where none may be",
    errno.ENOENT: "no such file or folder",
    errno.EIO: "the disk or the network fails",
    errno.EMFILE: "too many files are open",
    errno.EFBIG: "the file would be too large",
}


def reason(error: OSError) -> str:
    """What went wrong with a file, in words."""
    known = _REASONS.get(error.errno or 0)
    return known or shown(error.strerror or error)


def user_path(path: str | Path, prefix: str = "", *, file: bool = False) -> Path:
    """A path as a user wrote it, with `~` as the home folder.

    Args:
        path: as it was written.
        prefix: begins the message.
        file: it is of a file to be written, and no folder's: pathlib drops a slash at the end.

    Raises:
        UserError: for the home folder of somebody who is not known here.
    """
    if file and str(path).endswith((os.sep, f"{os.sep}.")):
        raise UserError(f"{prefix} {shown(path)}: is how a folder is named; name a file".lstrip())
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{prefix + ' ' if prefix else ''}{shown(path)}: there is no home folder of that user "
            "here; write the path in full"
        ) from None


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: to a temporary name beside it, synced, then renamed. A file
    that is there keeps its mode and owner; a link that is there is replaced and not followed."""
    with unfinished_file(path) as file:
        status = _lstat(path)
        if status is not None and stat.S_ISREG(status.st_mode):
            # As far as user and file system can.
            with contextlib.suppress(OSError):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            with contextlib.suppress(OSError):
                os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
        file.write(data)


def append_line(path: Path, text: str) -> None:
    """Add a line to a text file, which is made if missing.

    Raises:
        UserError: what has its name is a link, or no regular file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{shown(path)}: is no regular file; delete it") from None
        raise
    with os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{shown(path)}: is no regular file; delete it")
        file.write(f"{text}\n")


def json_bytes(value: Any) -> bytes:
    """Indented JSON with sorted keys: equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `json_bytes`."""
    write_atomic(path, json_bytes(value))


def keys_once(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """An `object_pairs_hook` for `json.loads`, which by itself takes the last of two equal keys.

    Args:
        where: what to call the text in messages.

    Raises:
        UserError: when called with a key that is there twice.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in entries if keys.count(key) > 1)
            raise UserError(f"{where}: the key {shown(repr(twice))} is there twice: keep one")
        return entries

    return mapping


def read_json(path: Path) -> Any:
    """Parse a JSON file of ours; a broken one is a `UserError` that names it."""
    try:
        # Not waited for: a pipe in its place.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{shown(path)}: is no regular file; restore or delete it")
            return json.loads(file.read().decode(), object_pairs_hook=keys_once(shown(path)))
    except FileNotFoundError:
        raise UserError(f"{shown(path)}: there is no such file") from None
    except RecursionError:
        raise UserError(f"{shown(path)}: broken JSON: nested too deeply") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"{shown(path)}: broken or truncated JSON ({shown(error)}); restore or delete it"
        ) from None


def read_regular(path: Path) -> bytes:
    """A file's bytes, if it is a regular file itself: no link to one is followed, and no pipe or
    device waited for.

    Raises:
        UserError: for anything else, and what is not there.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read()
    except OSError as error:
        problem = "is a link" if path.is_symlink() else reason(error)
        raise UserError(f"{shown(path)}: {problem}") from None
    raise UserError(f"{shown(path)}: is no regular file")


def plain_name(name: object) -> bool:
    """Whether a text from a file is the name of a file in a folder, and nothing that leads out of
    it: no path, not on any system, and nothing hidden or unprintable."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and not name.startswith(".")
        and not set(name) & set("/\\:")
        and 0 < len(name.encode("utf-8", "surrogatepass")) <= NAME_BYTES
    )


def require_output_file(path: Path, name: str, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuse a place where a whole file may not be put, before the work and not after it.

    What may be written is a new file or a regular one, which is replaced; not what a link leads
    to, no device, no pipe, and none of the inputs, by whichever name.

    Args:
        path: the file.
        name: of the argument that gave it.
        inputs: what the command reads: files, folders, network@weights, or names of other things.

    Raises:
        UserError: where it may not.
    """
    where = argument(name, path)
    status = _require_name(path, where)
    if status is None:
        _require_room(path.parent, where)
        return
    if stat.S_ISLNK(status.st_mode):
        raise UserError(f"{where}: is a link, which is not followed; name the file itself")
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{where}: is a folder; name a file")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{where}: is a device or a pipe and no regular file; name a file")
    if not os.access(path, os.W_OK):
        raise UserError(f"{where}: permission denied: it is read-only; name another file")
    for named_input in inputs:
        for source in _parts(named_input):
            if _holds(source, path, status):
                raise UserError(
                    f"{where}: is one of the inputs ({shown(source)}), and would be replaced; name "
                    "another file"
                )
    _require_room(path.parent, where)


def require_output_folder(path: Path, name: str, *, link: bool = True) -> None:
    """Refuse a place that cannot become a folder to write in, before the work.

    Args:
        path: the folder, there or not.
        name: of the argument that gave it.
        link: whether it may be a link to a folder.

    Raises:
        UserError: where it cannot.
    """
    where = argument(name, path)
    status = _require_name(path, where)
    if status is None:
        _require_room(path.parent, where)
    elif stat.S_ISLNK(status.st_mode) and not (link and path.is_dir()):
        if path.is_dir():
            raise UserError(f"{where}: is a link; name the folder itself, {path.resolve()}")
        raise UserError(f"{where}: is a link that leads to no folder; choose another folder")
    elif not path.is_dir():
        raise UserError(f"{where}: a file is in the way; choose another folder")


def require_apart(*outputs: tuple[str, Path | None]) -> None:
    """Refuse two outputs of one name.

    Args:
        outputs: the argument's name, and the file it gave.
    """
    argument_of: dict[Path, str] = {}
    for name, path in outputs:
        if path is not None:
            place = path.parent.resolve() / path.name
            if place in argument_of:
                raise UserError(
                    f"{argument(name, path)}: is what {argument(argument_of[place])} names too; "
                    "give two files"
                )
            argument_of[place] = name


def require_not_read(path: Path | None, name: str, files: Iterable[Path]) -> None:
    """Refuse an output that is one of the `files` of an input, which only its reader knows."""
    status = None if path is None else _lstat(path)
    if path is None or status is None:
        return
    for file in files:
        try:
            same = os.path.samestat(file.stat(), status)
        except OSError:
            continue
        if same:
            raise UserError(
                f"{argument(name, path)}: is one of the inputs ({shown(file)}), and would be "
                "replaced; name another file"
            )


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _require_name(path: Path, where: str) -> os.stat_result | None:
    """What has this name already; None for nothing."""
    try:
        if any(len(os.fsencode(part)) > NAME_BYTES for part in path.parts):
            raise UserError(f"{where}: the name is too long; {NAME_BYTES} bytes are the most")
        return _lstat(path)
    except NotADirectoryError:
        return None
    except OSError as error:
        raise UserError(f"{where}: {reason(error)}") from None
    except ValueError:
        raise UserError(f"{where}: is no possible name of a file") from None


def _require_room(folder: Path, where: str) -> None:
    """Refuse a folder that is none, or in which nothing can be made."""
    for place in (folder, *folder.parents):
        try:
            status = place.stat()
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise UserError(f"{where}: {shown(place)} is a link that leads nowhere") from None
            continue
        except OSError as error:
            raise UserError(f"{where}: {shown(place)}: {reason(error)}") from None
        if not stat.S_ISDIR(status.st_mode):
            raise UserError(
                f"{where}: a file is in the way: {shown(place)} is a file, not a folder"
            )
        try:
            # Made and gone: permissions alone do not tell of file systems such as /proc.
            with tempfile.TemporaryFile(dir=place):
                return
        except OSError as error:
            raise UserError(
                f"{where}: nothing can be written in {shown(place)}: {reason(error)}"
            ) from None


def _parts(named_input: str | Path | None) -> Iterator[Path]:
    """The files and folders that an input may name: `network@weights` names two."""
    if named_input is None or str(named_input) == "":
        return
    network, _, weights = str(named_input).rpartition("@")
    labels = label_set(str(named_input))
    for text in {str(named_input), network, weights, labels[1] if labels else ""} - {""}:
        yield user_path(text)


def _holds(source: Path, path: Path, status: os.stat_result) -> bool:
    """Whether the file `path` is the input `source`, is read with the folder `source`, or belongs
    to the set that the file `source` describes; by whichever name."""
    try:
        source_status = source.stat()
    except (OSError, ValueError):
        return False
    if os.path.samestat(source_status, status):
        return True
    place, root = path.resolve(), source.resolve()
    if not stat.S_ISDIR(source_status.st_mode):
        # It may describe a set whose images and labels are around it.
        root = root.parent
        of_a_set = IMAGE_SUFFIXES | {".txt", ".xml"}
        if place.suffix.lower() in of_a_set and place.is_relative_to(root):
            return True
    elif place.is_relative_to(root):
        return _is_read(root, place)
    # Another name of a file in the folder, which only then has several.
    return status.st_nlink > 1 and any(
        os.path.samestat(os.lstat(os.path.join(folder, name)), status)
        for folder, _, names in os.walk(root)
        for name in names
    )


def _is_read(root: Path, place: Path) -> bool:
    """Whether a file in a folder of images, of a set or of a run is read with it."""
    if place.name in _READ_NAMES:
        return True
    if place.suffix.lower() in IMAGE_SUFFIXES and (root / "manifest.json").is_file():
        # Of a set of ours; other pictures in its folder are none of it.
        return place.is_relative_to(root / "images")
    return place.suffix.lower() in _READ_SUFFIXES

"""What every command has in common: what a user can mend becomes one line and exit code 2."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .errors import UserError
from .processes import Terminated, heeding_sigterm

F = TypeVar("F", bound=Callable[..., Any])

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a file is where a folder should be",
}

# How torch's own file writer puts it, which knows no errno.
_TORCH_DISK = ("No space left", "PytorchStreamWriter failed", "inline_container", "iostream error")


_RESUMED = {"synthesize", "qat", "demo"}
"""Commands that go on where they were stopped; the others begin anew."""

_GRACE_SECONDS = 5.0
"""How long a command that is told to stop may take to end in order."""


def _fail(message: str) -> None:
    for line in message.splitlines():
        click.echo(f"error: {line}", err=True)
    sys.exit(2)


def mendable(command: F) -> F:
    """Turn what the user can mend into one line and exit code 2; leave bugs their traceback."""

    resumed = command.__name__ in _RESUMED
    stopped = "stopped" + ("; the same command goes on from here" if resumed else "")
    again = "; what is finished is kept, run the command again" if resumed else ""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with heeding_sigterm(stopped, 143, grace=_GRACE_SECONDS):
                return command(*args, **kwargs)
        except UserError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno not in _DISK:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{_DISK[error.errno]}{again}")
        except RuntimeError as error:
            # torch reports a full disk and a full device as plain RuntimeErrors.
            text = str(error).splitlines()[0] if str(error) else ""
            if any(sign in text for sign in _TORCH_DISK):
                _fail(f"the disk is full{again}")
            if "out of memory" in text:
                _fail(f"out of memory ({text}); lower the batch size or the image size")
            raise
        except KeyboardInterrupt as stop:
            click.echo(stopped, err=True)
            # 128 and the number of the signal, as shells have it.
            sys.exit(143 if isinstance(stop, Terminated) else 130)

    return wrapped  # type: ignore[return-value]


def checkpoint_option(command: F) -> F:
    """`--checkpoint`, for a network that `--model` names without its weights; the command gets both
    as one `model`."""

    @click.option(
        "--checkpoint",
        metavar="FILE",
        help="Weights of a --model that is a network only: torchvision/NAME or an mmdet config.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, checkpoint: str | None, **kwargs: Any) -> Any:
        if checkpoint is not None:
            if kwargs["model"] is None:
                _fail("--checkpoint: whose weights? give --model as well")
            kwargs["model"] = f"{kwargs['model']}@{checkpoint}"
        return command(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def check_output(path: Path | None, option: str = "--json") -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{option} {path}: {parent} is a file, not a folder")

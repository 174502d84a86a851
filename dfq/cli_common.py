"""What every command has in common: what a user can mend becomes one line and exit code 2."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .errors import UserError
from .plain import brief

if TYPE_CHECKING:
    from .recipe import Recipe

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


def _fail(message: str) -> None:
    for line in message.splitlines():
        click.echo(f"error: {line}", err=True)
    sys.exit(2)


def mendable(command: F) -> F:
    """Turn what the user can mend into one line and exit code 2; leave bugs their traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno not in _DISK:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{_DISK[error.errno]}; what is finished is kept, run the command again")
        except RuntimeError as error:
            # torch reports a full disk and a full device as plain RuntimeErrors.
            text = str(error).splitlines()[0] if str(error) else ""
            if any(sign in text for sign in _TORCH_DISK):
                _fail("the disk is full; what is finished is kept, run the command again")
            if "out of memory" in text:
                _fail(f"out of memory ({text}); lower the batch size or the image size")
            raise
        except KeyboardInterrupt:
            click.echo("stopped; the same command goes on from here", err=True)
            sys.exit(130)

    return wrapped  # type: ignore[return-value]


def checkpoint_option(command: F) -> F:
    """`--checkpoint` and `--random-weights`, for a network that `--model` names without its
    weights; the command gets all as one `model`."""

    @click.option(
        "--checkpoint",
        metavar="FILE",
        help="Weights of a --model that is a network only: torchvision/NAME or an mmdet config.",
    )
    @click.option(
        "--random-weights",
        is_flag=True,
        help="Do without the weights of such a --model.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, checkpoint: str | None, random_weights: bool, **kwargs: Any) -> Any:
        if checkpoint is not None and random_weights:
            _fail("--checkpoint and --random-weights contradict: leave one out")
        weights = "random" if random_weights else checkpoint
        if weights is not None:
            if kwargs["model"] is None:
                option = "random-weights" if random_weights else "checkpoint"
                _fail(f"--{option}: whose weights? give --model as well")
            kwargs["model"] = f"{kwargs['model']}@{weights}"
        return command(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def settings_of(recipe: str | None, overrides: Sequence[str], **values: Any) -> Recipe:
    """The recipe of a command: `load_recipe`, with options and `--set` in agreement.

    Args:
        recipe, overrides, values: as for `load_recipe`.

    Raises:
        UserError: an option says something else than a `--set`, or the recipe is none.
    """
    from .recipe import load_recipe, parse_override

    stated = dict(map(parse_override, overrides))
    for key, value in values.items():
        path = key.replace("__", ".")
        parts = path.split(".")
        for depth in range(len(parts), 0, -1):
            above = ".".join(parts[:depth])
            if value is None or above not in stated:
                continue
            found = stated[above]
            for part in parts[depth:]:
                found = found.get(part, value) if isinstance(found, dict) else value
            if found != value:
                raise UserError(
                    f"--{parts[-1].replace('_', '-')} {brief(value)} and --set {above}="
                    f"{brief(stated[above])} contradict: leave one out"
                )
    return load_recipe(recipe, overrides, **values)


def check_output(path: Path | None, option: str = "--json") -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{option} {path}: {parent} is a file, not a folder")

"""Options and checks that commands share; user errors become one line and exit code 2."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ..errors import UserError, shown
from ..runtime.files import (
    json_bytes,
    reason,
    require_output_file,
    require_output_folder,
    user_path,
    write_atomic,
)
from ..runtime.plain import brief
from ..runtime.processes import Terminated, heeding_sigterm

if TYPE_CHECKING:
    from ..data.calibration_set import CalibrationSet
    from ..recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])


class _PathOrEmpty(click.Path):
    """A path; an empty text stays one, which pathlib would call the present folder."""

    def convert(self, value: Any, *about: Any) -> Any:
        return value if value == "" else super().convert(value, *about)


PATH = _PathOrEmpty(path_type=Path, readable=False)
"""A path as it is given; what is wrong with it, the command says in a line."""

FILE = _PathOrEmpty(readable=False)
"""The same of a file to be written, as text: how it ends says whether a folder was meant."""

# With these, more of the same will do once there is room: nothing that was done is lost.
_FULL = {errno.ENOSPC, errno.EDQUOT}

# Errors without a file's name that are the surroundings' all the same.
_SURROUNDINGS = _FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE}

# How torch's own file writer puts it, which knows no errno.
_TORCH_DISK = ("No space left", "PytorchStreamWriter failed", "inline_container", "iostream error")

_RESUMED = {"synthesize", "quantize", "ptq", "qat", "deploy", "demo"}
"""Commands that go on where they were stopped; the others begin anew."""

_GRACE_SECONDS = 5.0
"""How long a command that is told to stop may take to end in order."""


def _fail(message: str) -> None:
    for line in message.splitlines():
        click.echo(f"error: {shown(line, limit=2000)}", err=True)
    sys.exit(2)


def report_user_errors(command: F) -> F:
    """Prints user errors as one line and exits with code 2; bugs raise."""

    resumed = command.__name__ in _RESUMED
    stopped = "stopped" + ("; the same command goes on from here" if resumed else "")
    again = "; what is finished is kept, run the command again" if resumed else ""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            _refuse_empty(click.get_current_context(silent=True))
            with heeding_sigterm(stopped, 143, grace=_GRACE_SECONDS):
                result = command(*args, **kwargs)
                sys.stdout.flush()
        except UserError as error:
            _fail(str(error))
        except OSError as error:
            lost = _drop_output()
            if lost and isinstance(error, BrokenPipeError):
                # Whoever read the output has read enough.
                sys.exit(1)
            if error.filename is None and error.errno not in _SURROUNDINGS:
                raise
            where = f"{shown(error.filename)}: " if error.filename is not None else ""
            _fail(f"{where}{reason(error)}{again if error.errno in _FULL else ''}")
        except RuntimeError as error:
            # torch reports a full disk and a full device as plain RuntimeErrors.
            text = str(error).splitlines()[0] if str(error) else ""
            if any(sign in text for sign in _TORCH_DISK):
                _fail(f"the disk is full{again}")
            # Of a GPU, and of the machine itself.
            if "out of memory" in text or "can't allocate memory" in text:
                _fail(f"out of memory ({text}); lower the batch size or the image size")
            raise
        except KeyboardInterrupt as stop:
            click.echo(stopped, err=True)
            # 128 and the number of the signal, as shells have it.
            sys.exit(143 if isinstance(stop, Terminated) else 130)
        return result

    return wrapped  # type: ignore[return-value]


def _refuse_empty(context: click.Context | None) -> None:
    """Refuse an empty value, which a shell makes of a variable that is not set: as a path it would
    be the present folder."""
    if context is None:
        return
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        empty = "" in value if isinstance(value, tuple) else value == ""
        stated = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        # What is wrong with an override is said of the whole text; a bare flag may be empty.
        may_be = name == "overrides" or getattr(parameter, "flag_value", None) == ""
        if empty and stated and not may_be:
            shown_name = (
                parameter.opts[0] if isinstance(parameter, click.Option) else parameter.metavar
            )
            raise UserError(f"{shown_name}: is empty; give a value, or leave it out")


def _drop_output() -> bool:
    """Let go of what standard output cannot take, if so: Python would try again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def require_streams() -> None:
    """Give a process whose standard streams were closed others, before a file that it opens takes
    their numbers; without standard output there is no work to do."""
    closed = sys.stdout is None
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # The lowest number that is free, which is its own.
            setattr(
                sys,
                name,
                os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"),
            )
    if closed:
        _fail("standard output is closed, and results go there; give it a file, or > /dev/null")


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


def common_options(command: F) -> F:
    """`--device` and `--trust`."""
    command = click.option(
        "--trust", is_flag=True, help="Run what is in the checkpoint: only if you trust its author."
    )(command)
    return click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, ..."
    )(command)


def quick_option(command: F) -> F:
    """`--quick`."""
    return click.option(
        "--quick",
        is_flag=True,
        help="For a laptop: 32 images of 320 px at most, fewer steps; other options count first.",
    )(command)


def settings_options(command: F) -> F:
    """`--seed` and `--set`."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a value of the recipe, e.g. distillation.epochs=10.",
    )(command)
    return click.option(
        "--seed", type=int, show_default="0, or the recipe's", help="Fixes the result."
    )(command)


def settings_of(
    recipe: str | None, overrides: Sequence[str], *, quick: bool = False, **values: Any
) -> Recipe:
    """The recipe of a command: `load_recipe`, with options and `--set` in agreement.

    Args:
        recipe, overrides, quick, values: as for `load_recipe`.

    Raises:
        UserError: an option says something else than a `--set`, or the recipe is none.
    """
    from ..recipe import load_recipe
    from ..recipe.overrides import parse_override

    stated = dict(map(parse_override, overrides))
    for key, value in values.items():
        path = key.replace("__", ".")
        parts = path.split(".")
        for depth in range(len(parts), 0, -1):
            above = ".".join(parts[:depth])
            if value is None or above not in stated:
                continue
            stated_value = stated[above]
            for part in parts[depth:]:
                stated_value = (
                    stated_value.get(part, value) if isinstance(stated_value, dict) else value
                )
            if stated_value != value:
                raise UserError(
                    f"--{parts[-1].replace('_', '-')} {brief(value)} and --set {above}="
                    f"{brief(stated[above])} contradict: leave one out"
                )
    return load_recipe(recipe, overrides, quick=quick, **values)


def output_file(
    path: str | Path | None, name: str = "json", inputs: Iterable[str | Path | None] = ()
) -> Path | None:
    """An output's path as the user means it, refused where it cannot be written: before the work,
    not after it. Arguments and errors are those of `require_output_file`."""
    if path is None:
        return None
    path = user_path(path, f"--{name}", file=True)
    require_output_file(path, name, inputs)
    return path


def output_folder(path: Path | None, name: str = "out", *, link: bool = True) -> Path | None:
    """The same of a folder; arguments and errors are those of `require_output_folder`."""
    if path is None:
        return None
    path = user_path(path, f"--{name}")
    require_output_folder(path, name, link=link)
    return path


def write_output(path: Path, data: bytes, name: str = "json") -> None:
    """Write an output's file, and make the folder it is to be in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Looked at again: the work took its time.
    require_output_file(path, name)
    write_atomic(path, data)


def write_json_output(path: Path | None, value: Any) -> None:
    """The same of JSON for `--json`; nothing where none is asked for."""
    if path is not None:
        write_output(path, json_bytes(value))


def tell_quality(made: CalibrationSet) -> dict[str, Any] | None:
    """Say how well a set meets the network's statistics, and what to worry about; returns it as
    JSON has it, None for a set that does not know."""
    from ..synthesis.quality import quality_of

    quality = quality_of(made.manifest)
    if quality is None:
        return None
    click.echo(quality.summary())
    for line in quality.warnings():
        click.echo(f"warning: {line}", err=True)
    return quality.to_dict()


def tensorboard_option(command: F) -> F:
    return click.option(
        "--tensorboard",
        type=PATH,
        show_default="none are written",
        help="Folder for the curves of the loss.",
    )(command)

"""The one exception that means "the user can mend this": printed as a line, exit code 2; and how
such a line names arguments and shows what files and users gave.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_LONGEST_LINE = 2000

_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)


class UserError(Exception):
    """A mistake in what was asked for: a missing file, an impossible setting, a full disk.

    The message is a line that says what is wrong, where, and what to do. The command line
    prints it without a traceback and exits with code 2; callers of the Python functions catch it
    like any other exception. Arguments are named as flags, `--image-size`; the functions of `dfq`
    name them as Python has them (see `in_python`).

    Args:
        lines: of the message; more than one where several things are wrong. Whatever in them is not
            printable, such as a new line in a file's name, is escaped.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\n".join(shown(line, limit=_LONGEST_LINE) for line in self.args)


class DivergedError(UserError):
    """Training whose loss stopped being finite; `method: auto` falls back on the start."""


def argument(name: str, value: object | None = None) -> str:
    """An argument as a message names it, with its value where one is given."""
    flag = f"--{name.replace('_', '-')}"
    return flag if value is None else f"{flag} {shown(value)}"


_SET = re.compile(r"(?<![\w-])--set ([\w.]+)=((?:\{[^}]*\}|\[[^\]]*\]|[^\s,;:])+)")
# Options that stand for another way of naming a model, which is there in parentheses.
_WEIGHTS = re.compile(r"--(?:checkpoint FILE|random-weights) \(([^()\s]*@[^()\s]*)\)")
_FLAG = re.compile(
    r"(?<![\w-])--(against|batch-size|budget|checkpoint|compare|cost|data|device|images|image-size|init|interval"
    r"|iterations|labels|model|out|photos|recipe|seed|select-on|set|target|tensorboard|threshold|trust|workers)\b"
)


def in_python(message: str) -> str:
    """A message that names flags, for a caller who has arguments."""
    message = _WEIGHTS.sub(r"model='\1'", message)
    message = _SET.sub(lambda match: f"overrides={{'{match[1]}': {match[2]}}}", message)

    def name(match: re.Match[str]) -> str:
        # A whole command line in a message stays one.
        clause = re.split(r"[;:]\s|[()]", message[: match.start()])[-1]
        if re.search(r"\b(dfq|torchrun) ", clause):
            return match[0]
        known = {"set": "'overrides'", "trust": "trust=True"}
        return known.get(match[1], f"'{match[1].replace('-', '_')}'")

    return _FLAG.sub(name, message)


def for_python(function: F) -> F:
    """The same function, whose `UserError`s name arguments and not flags."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            error.args = tuple(in_python(line) for line in error.args)
            raise
        except OSError as error:
            # A name that cannot be one; what disks and networks do is no mistake of the caller's.
            if error.errno not in _NAMES or error.filename is None:
                raise
            problem = os.strerror(error.errno)
            raise UserError(f"{shown(error.filename)}: {problem.lower()}") from error

    return wrapped  # type: ignore[return-value]


def shown(value: object, limit: int = 200) -> str:
    """Text that a file or a user gave, as a message can hold it: on one line, no longer than
    `limit` characters, and with whatever a terminal would act on or could not encode escaped."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[: limit - 3]}..."
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Within this context a mistake is said with the name of what it is in, unless it names it."""
    try:
        yield
    except UserError as error:
        if str(source) in str(error):
            raise
        raise UserError(f"{source}: {error}") from error

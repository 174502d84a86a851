"""The one exception that means "the user can mend this": printed as a line, exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what was asked for: a missing file, an impossible setting, a full disk.

    The message is a single line that says what is wrong, where, and what to do. The command line
    prints it without a traceback and exits with code 2; callers of the Python functions catch it
    like any other exception.
    """


class DivergedError(UserError):
    """Training whose loss stopped being finite; `method: auto` falls back on the start."""

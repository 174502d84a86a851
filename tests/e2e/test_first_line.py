"""A terminal is told at once that PyTorch is being loaded; a log is not."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

DFQ = (sys.executable, "-m", "dfq")


def on_terminal(*words: str) -> list[str]:
    """The lines that a command shows on a terminal."""
    terminal, end = pty.openpty()
    process = subprocess.Popen([*DFQ, *words], stdin=end, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    process.wait()
    os.close(terminal)
    return shown.decode().splitlines()


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (("inspect", "--model", "demo"), "loading PyTorch"),
        (("inspect", "--model", "missing.pt"), "loading PyTorch"),
        (("--version",), ""),
    ],
)
def test_a_terminal_is_told_that_libraries_are_loaded(words: tuple[str, ...], first: str) -> None:
    lines = on_terminal(*words)
    assert lines[0].startswith(first)
    assert sum("loading PyTorch" in line for line in lines) == bool(first)


def test_a_log_holds_what_is_wrong_alone() -> None:
    done = subprocess.run(
        [*DFQ, "inspect", "--model", "missing.pt"], capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")

"""What becomes of a command that is told to stop, and of its workers while they still import.

The workers of these tests import a `torch` that never comes to an end, as it is on a slow and busy
machine: nothing here depends on how long anything takes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.forks import PATIENCE, ended, start, until, wait_for
from support.harness import command

from dfq.runtime import processes

# As the loader of a library keeps it: for C code holds the interpreter meanwhile, no Python thread
# runs.
ENDLESS = """
import ctypes, os, pathlib
pathlib.Path(os.environ["IMPORTING"], str(os.getpid())).touch()
ctypes.PyDLL(None).sleep(3600)
"""

# The command itself has imported everything before its workers are given the other torch.
COMMAND = """
import sys
import dfq.api.evaluate
import dfq.api.synthesize
from dfq.synthesis import worker_pool
start = worker_pool._start
def stub():
    sys.path.insert(0, {stub!r})
    try:
        return start()
    finally:
        del sys.path[0]
worker_pool._start = stub
from dfq.cli.main import cli
cli(sys.argv[1:])
"""


@pytest.fixture
def importing(tmp_path: Path) -> Iterator[Path]:
    """A folder that tells who imports the endless torch; nobody is left behind."""
    folder = tmp_path / "importing"
    folder.mkdir()
    yield folder
    for pid in map(int, os.listdir(folder)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stub(place: Path) -> str:
    """Where the endless torch is."""
    package = place / "stub" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(ENDLESS)
    return str(package.parent)


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(
    ("number", "group"),
    [
        (signal.SIGTERM, False),
        (signal.SIGKILL, False),
        (signal.SIGINT, False),
        (signal.SIGTERM, True),
        (signal.SIGINT, True),
    ],
)
def test_workers_do_not_outlive_a_parent_while_they_import(
    place: Path, model: Path, importing: Path, number: signal.Signals, group: bool
) -> None:
    words = [
        "synthesize", "--model", str(model), "--recipe", "tiny.yaml", "--out", "set",
        "--workers", "2",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(stub=stub(place)), *words],
        env={**os.environ, "IMPORTING": str(importing)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        until(lambda: len(os.listdir(importing)) == 2, lambda: process.poll() is None)
        (os.killpg if group else os.kill)(process.pid, number)
        printed, errors = process.communicate(timeout=PATIENCE)
    workers = [int(name) for name in os.listdir(importing)]
    until(lambda: not any(map(alive, workers)))
    assert printed == ""
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        # One line, the same for both.
        assert errors == "stopped; the same command goes on from here\n"
        assert process.returncode == 128 + number


def test_a_worker_whose_parent_was_gone_before_it_looked(place: Path, importing: Path) -> None:
    """It is told the id of a process that is not its parent."""
    environment = {**os.environ, "IMPORTING": str(importing), "PYTHONPATH": stub(place)}
    done = subprocess.run(
        [sys.executable, "-m", "dfq.synthesis.worker_process", "0", "1"],
        env=environment,
        timeout=PATIENCE,
        check=False,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_what_torchrun_started_ends_with_it_while_it_imports(place: Path, importing: Path) -> None:
    """Here, the launcher is a shell that is killed; the imports let other threads run."""
    endless = stub(place)
    torch = Path(endless) / "torch" / "__init__.py"
    torch.write_text(ENDLESS.replace("PyDLL", "CDLL"))
    words = "synthesize --model demo --out set"
    launcher = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -m dfq {words} & wait"],
        env={
            **os.environ, "IMPORTING": str(importing), "PYTHONPATH": endless,
            "WORLD_SIZE": "2", "RANK": "0",
        },
    )  # fmt: skip
    until(lambda: bool(os.listdir(importing)), lambda: launcher.poll() is None)
    (rank,) = map(int, os.listdir(importing))
    assert alive(rank)
    launcher.kill()
    launcher.wait(PATIENCE)
    until(lambda: not alive(rank))


def test_sigterm_and_sigint_stop_a_synthesis_alike(place: Path, model: Path) -> None:
    words = [
        "synthesize", "--model", str(model), "--recipe", "tiny.yaml", "--out", "set",
        "--set", "synthesis.images=4000", "--workers", "1",
    ]  # fmt: skip

    def shards() -> int:
        return len(list((place / "set").glob("shards/0*.json")))

    for number in (signal.SIGINT, signal.SIGTERM):
        before = shards()
        process = start(words, place / "said.txt")
        wait_for(lambda: shards() > before, process)  # noqa: B023
        os.kill(process.pid, number)
        assert ended(process) == 128 + number
        assert (place / "said.txt").read_text().splitlines()[-1] == (
            "stopped; the same command goes on from here"
        )
        (place / "said.txt").unlink()
        # No half of anything is left, nor the lock.
        assert not list(place.rglob("*.tmp"))
        assert not (place / "set" / ".lock").exists()


@pytest.mark.parametrize("words", [("eval", "--data", "set"), ("inspect",), ("sensitivity",)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_begins_anew_promises_nothing(
    place: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    number: signal.Signals,
) -> None:
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    for verb in ("evaluate", "inspect", "sensitivity"):
        monkeypatch.setattr(f"dfq.api.{verb}.{verb}", stop)
    result = command(*words, "--model", model)
    assert result.exit_code == 128 + number
    assert result.stderr == "stopped\n"
    # Afterwards it is as it was.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("words", [("synthesize",), ("qat", "--recipe", "w4a8")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_goes_on_says_so(
    place: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    number: signal.Signals,
) -> None:
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    for verb in ("synthesize", "quantize"):
        monkeypatch.setattr(f"dfq.api.{verb}.{verb}", stop)
    result = command(*words, "--model", model)
    assert result.exit_code == 128 + number
    assert result.stderr == "stopped; the same command goes on from here\n"


HELD = """
import hashlib
from dfq.cli import options
options._GRACE_SECONDS = 0.1
@options.report_user_errors
def synthesize():
    print("working", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
synthesize()
"""


def test_sigterm_does_not_wait_for_the_end_of_a_long_operation() -> None:
    """As a backward pass is one, in which no Python handler runs: this one takes half an hour."""
    with subprocess.Popen(
        [sys.executable, "-c", HELD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert errors == "stopped; the same command goes on from here\n"


def test_a_parent_is_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    class Thread:
        def __init__(self, *, name: str, **_: object) -> None:
            started.append(name)

        def start(self) -> None: ...

    monkeypatch.setattr(processes, "_WATCHED", set())
    monkeypatch.setattr(processes.threading, "Thread", Thread)
    for _ in range(3):
        processes.end_with_parent(os.getppid())
    assert started == ["parent watch"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(processes, "_WATCHED", set())
    processes.end_with_launcher()
    assert started == ["parent watch"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.end_with_launcher()
    assert started == ["parent watch"] * 2

"""`dfq` in processes of its own that can be killed, without importing torch for each of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

PATIENCE = 1200.0
"""Seconds after which a test takes what it waits for for lost: never met, however slow and busy the
machine, by what works."""

# One process imports torch once; each command is a fork of it, with its own id to kill.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "dfq.api.quantize",
        "dfq.api.synthesize",
        "dfq.api.evaluate",
        "dfq.models.yolov5.detector",
        "dfq.models.ultralytics.detector",
    ]
)


def _main(words: list[str], environment: dict[str, str], threads: int, output: str) -> None:
    from dfq.cli.main import cli

    # Otherwise it has that of the test which started the process it was forked from.
    os.environ.update(environment)
    torch.set_num_threads(threads)
    file = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    cli(words)


def start(
    words: list[str], output: Path | None = None, **environment: str
) -> multiprocessing.process.BaseProcess:
    """Begin `dfq WORDS...`; what it prints goes to the file `output`, if any."""
    to = os.devnull if output is None else str(output)
    arguments = (words, {**os.environ, **environment}, torch.get_num_threads(), to)
    process = FORKS.Process(target=_main, args=arguments, daemon=True)
    process.start()
    return process


def launch(words: list[str], size: int, place: Path) -> list[multiprocessing.process.BaseProcess]:
    """The processes that torchrun would start; what each prints goes to `rank-N.txt`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    return [
        start(words, place / f"rank-{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **together)
        for rank in range(size)
    ]


def until(condition: Callable[[], bool], alive: Callable[[], bool] = lambda: True) -> None:
    """Wait until something is the case, as long as it takes.

    Args:
        condition: asked again and again.
        alive: whether the process that brings it about still runs.
    """
    end = time.monotonic() + PATIENCE
    while not condition():
        assert alive() or condition(), "the process ended before it got that far"
        assert time.monotonic() < end, "the process got nowhere"
        time.sleep(0.002)


def wait_for(condition: Callable[[], bool], process: multiprocessing.process.BaseProcess) -> None:
    """Wait until a process has brought something about."""
    until(condition, process.is_alive)


def ended(process: multiprocessing.process.BaseProcess) -> int:
    """The exit code of a process, once it has one."""
    process.join(PATIENCE)
    assert process.exitcode is not None, "the process does not end"
    return process.exitcode


@contextlib.contextmanager
def paused(process: multiprocessing.process.BaseProcess) -> Iterator[None]:
    """Stop a process for the time of the block: it is in the middle of its work all the while."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    assert process.is_alive(), "the process ended before it was to be stopped"
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def killed(process: multiprocessing.process.BaseProcess) -> None:
    """Kill a process and wait until it is gone."""
    process.kill()
    ended(process)

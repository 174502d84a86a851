"""Worker processes on one machine, which the calling process deals shards to.

Shards are independent, so on a CPU processes of one thread each scale better than threads within
one operation, and every shard comes out the same whoever makes it. On a GPU several processes share
it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..data.calibration_writer import CalibrationWriter
from ..errors import UserError
from ..models.base import Model
from ..runtime.malloc import with_huge_pages
from .settings import Synthesis
from .shards import Plan, ShardReport

WORTHWHILE = 2e8
"""Pixels times iterations from which workers pay for the seconds they take to start (512 images of
640 px and 200 iterations are 4e10)."""

_PROCESS_BYTES = 8e8
"""What a worker takes before it optimises anything: libraries and weights."""


def worker_count(
    asked: int | None,
    cores: int,
    detector: Model,
    settings: Synthesis,
    plan: Plan,
    missing: list[int],
) -> int:
    """How many workers to make the shards `missing` with; 1: none, this process does it.

    Args:
        asked: so many, if there are as many shards; None: one for each core, as far as memory
            allows and if the work is worth it.
        cores: how many threads torch would use: the machine's cores, or OMP_NUM_THREADS.
        detector: folded, as the optimisation uses it.

    Raises:
        UserError: for none.
    """
    if asked is not None and asked < 1:
        raise UserError(f"workers: {asked} is no number of processes; 1 or more")
    if asked is not None:
        return max(1, min(asked, len(missing)))
    if detector.device.type != "cpu":
        # One keeps a GPU busy, with as many shards side by side as that takes.
        return 1
    stage = settings.label_stage
    side = settings.image_size or detector.image_size
    image_work = settings.iterations * side**2
    if settings.labels == "adaptive":
        image_work += stage.iterations * stage.image_size**2
    if sum(plan.count(index) for index in missing) * image_work < WORTHWHILE:
        return 1
    most = min(cores, len(missing))
    if most > 1:
        need = _PROCESS_BYTES + _activation_bytes(detector, side) * plan.count(missing[0])
        most = min(most, int(_free_memory() / need))
    return max(1, most)


def _activation_bytes(detector: Model, side: int) -> float:
    """Memory one image takes while its gradient is computed, measured on a small one."""
    small = 2 * detector.stride
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    image = torch.full((1, 3, small, small), 0.5).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        raw = detector.raw(image)
    for parameter in detector.module.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del raw
    # Twice, for gradients and what operations need for themselves: measured, 1.8 (YOLO11n) to 1.95
    # (YOLOv5n) times what is kept for the backward pass.
    return 2.0 * sum(sizes.values()) * (side / small) ** 2


def _free_memory() -> float:
    """Bytes that processes can still take here; unlimited where it cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (line,) = (text for text in lines if text.startswith("MemAvailable:"))
        free = float(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return float("inf")
    try:
        # In a container the limit is lower than the machine's memory.
        group = Path("/sys/fs/cgroup")
        limit = float((group / "memory.max").read_text())
        free = min(free, limit - float((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(free, 0.0)


class Workers:
    """Makes shards with `count` processes; a `ShardMaker`.

    Args:
        detector: on the device that each of them computes on.
        settings: the `synthesis` section of a recipe.
        plan: of the set.
        writer: of the set, whose folder exists.
        count: of processes.
        at_once: shards that each of them makes side by side.
    """

    def __init__(
        self,
        detector: Model,
        settings: Synthesis,
        plan: Plan,
        writer: CalibrationWriter,
        count: int,
        at_once: int = 1,
    ) -> None:
        self.count = count
        device = str(detector.device)
        if device != "cpu":
            # What goes through the pipe has to be readable before there is a GPU.
            detector = detector.clone().to("cpu")
        # Not torch's pickling for processes: it takes shared memory, which containers are short of.
        self.job = pickle.dumps(
            (detector, device, settings, plan, writer.root.absolute(), writer.determinants, at_once)
        )

    def __call__(
        self, missing: list[int], report: ShardReport, written: Callable[[int], None]
    ) -> None:
        """Give out `missing`, one at a time to the next free worker.

        Raises:
            UserError: where a worker died.
            Exception: what a worker raised.
        """
        waiting = deque(missing)
        workers: dict[Connection, subprocess.Popen[bytes]] = {}
        try:
            for _ in range(self.count):
                connection, process = _start()
                workers[connection] = process
            running = dict(workers)
            for connection, process in workers.items():
                try:
                    connection.send_bytes(self.job)
                except OSError:
                    raise _death(process) from None
            while running:
                for connection in cast(list[Connection], wait(list(running))):
                    try:
                        kind, values = connection.recv()
                        if kind == "next":
                            connection.send(waiting.popleft() if waiting else None)
                    except (EOFError, OSError):
                        raise _death(workers[connection]) from None
                    if kind == "report":
                        report(*values)
                    elif kind == "written":
                        written(*values)
                    elif kind == "failed":
                        raise _failure(*values)
                    elif kind == "finished":
                        del running[connection]
        finally:
            for connection, process in workers.items():
                process.kill()
                process.wait()
                connection.close()


def _start() -> tuple[Connection, subprocess.Popen[bytes]]:
    """A process of its own rather than one of `multiprocessing`, which would run the caller's
    script a second time."""
    ours, theirs = Pipe()
    environment = with_huge_pages(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [
        sys.executable,
        "-m",
        "dfq.synthesis.worker_process",
        str(theirs.fileno()),
        str(os.getpid()),
    ]
    # Inherited: what reaches the whole group is kept from the worker from its very start.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        with theirs:
            process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ours, process


def _death(process: subprocess.Popen[bytes]) -> UserError:
    code = process.wait()
    how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.Signals(-code).name}"
    hint = "; if memory ran out, ask for fewer with --workers" if code == -signal.SIGKILL else ""
    return UserError(
        f"a worker process died ({how}); what is finished is kept, start the same command again to "
        f"go on{hint}"
    )


class _RemoteError(Exception):
    """Carries the stack of a worker into that of the caller."""


def _failure(error: Exception, stack: str) -> Exception:
    error.__cause__ = _RemoteError(f"in a worker process:\n{stack}")
    return error


def send(connection: Connection, kind: str, *values: Any) -> None:
    """A worker's message to its parent."""
    connection.send((kind, values))

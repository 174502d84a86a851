"""How a process ends: with its parent, or when it is told to. Imports nothing that takes long."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
"""Of Linux' sys/prctl.h."""

_LOOK_SECONDS = 0.2

# Which process watches which already: a fork has its own parent, and none of the threads.
_WATCHED: set[tuple[int, int]] = set()


class Terminated(KeyboardInterrupt):
    """A SIGTERM, which ends a command as Ctrl-C does."""


def end_with_parent(parent: int, *, by_kernel: bool = False) -> None:
    """End this process as soon as its parent has: nobody is left to read what it does.

    Args:
        parent: process id, taken while it was alive.
        by_kernel: let the kernel kill this process where it can, at once and whatever goes on in
            it (loading a library keeps all its threads from running). Only for a parent whose
            thread that started this process lives as long as this process is to: the kernel looks
            at the thread.
    """
    if by_kernel:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(2)
    if (os.getpid(), parent) in _WATCHED:
        return
    _WATCHED.add((os.getpid(), parent))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(2)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def end_with_launcher() -> None:
    """Where torchrun or its like started this process among others: end with it from now on, and
    not only when all imports are through."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        end_with_parent(os.getppid())


@contextlib.contextmanager
def heeding_sigterm(line: str, code: int, *, grace: float = 0.0) -> Iterator[None]:
    """Within the block, a SIGTERM ends the process with a line on standard error.

    Args:
        line: what to say.
        code: to exit with.
        grace: seconds that the block has to end by the `Terminated` that is raised in it, after
            which the process is ended as it is; 0: at once, and nothing is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A Python handler alone would have to wait for the end of a long backward pass.
    receive, send = os.pipe()
    os.set_blocking(send, False)
    through = threading.Event()

    def listen() -> None:
        with os.fdopen(receive, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] == signal.SIGTERM:
                    break
            else:
                return
        if grace > 0 and through.wait(grace):
            return
        try:
            print(line, file=sys.stderr, flush=True)
        finally:
            os._exit(code)

    def handle(*_: object) -> None:
        if grace > 0:
            raise Terminated

    threading.Thread(target=listen, name="stop watch", daemon=True).start()
    before = signal.signal(signal.SIGTERM, handle)
    wakeup = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    try:
        yield
    finally:
        through.set()
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        os.close(send)


class _SignalStack(ctypes.Structure):
    """Linux' `stack_t`."""

    _fields_ = (
        ("start", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


@contextlib.contextmanager
def keeping_signal_stack() -> Iterator[None]:
    """Within the block, a library may give this thread another stack for signals; it has its own
    again afterwards.

    OpenVINO's CPU plugin gives one that does not hold the registers of a thread that has used AMX:
    Ctrl-C would end in a segmentation fault. Python's stack, or none, will do.
    """
    if sys.platform != "linux":
        yield
        return
    library = ctypes.CDLL(None)
    before = _SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)

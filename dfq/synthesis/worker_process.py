"""One worker process: `python -m dfq.synthesis.worker_process FILE_DESCRIPTOR PARENT_ID`.

Started by `worker_pool.Workers`. It asks for a shard, makes it, and asks for the next; everything
it has to say goes through its connection.
"""

from __future__ import annotations

import sys

from ..runtime.processes import end_with_parent

if __name__ == "__main__":
    # Before all that takes time to import: the parent may be killed meanwhile.
    end_with_parent(int(sys.argv[2]), by_kernel=True)

import pickle
import signal
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection


def main(connection: Connection, parent: int) -> None:
    """Work until there are no more shards, or the parent ends."""
    end_with_parent(parent)
    # These reach the whole group; the parent ends its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Before the slow imports, for the parent waits until it is read.
    job = connection.recv_bytes()

    from .worker_pool import send

    try:
        _work(connection, job)
    except Exception as error:
        failure: Exception = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            failure = RuntimeError(f"{type(error).__name__}: {error}")
        send(connection, "failed", failure, traceback.format_exc())
        return
    send(connection, "finished")


def _work(connection: Connection, job: bytes) -> None:
    from ..data.calibration_writer import CalibrationWriter
    from ..errors import UserError
    from ..kernels.loader import why_none
    from ..runtime.distributed import one_thread
    from .inversion import Inversion
    from .pipeline import without_kernels
    from .shards import make_shards
    from .worker_pool import send

    detector, device, settings, plan, root, determinants, at_once = pickle.loads(job)
    detector.to(device)
    if without_kernels(detector, settings) != ("kernels" in determinants):
        # Compiled once a process: the disk may have filled up meanwhile.
        here = why_none() or "there is a C compiler"
        raise UserError(
            f"synthesis: {here} in a worker process, unlike in the one that started it, and the "
            "images would differ; run the same command again"
        )

    def dealt() -> Iterator[int]:
        while True:
            send(connection, "next")
            index = connection.recv()
            if index is None:
                return
            yield index

    with one_thread(detector.device):
        make_shards(
            Inversion(detector, settings),
            CalibrationWriter(root, determinants, detector.names, plan.shards),
            plan,
            dealt(),
            lambda *values: send(connection, "report", *values),
            lambda index: send(connection, "written", index),
            at_once,
        )


if __name__ == "__main__":
    try:
        main(Connection(int(sys.argv[1])), int(sys.argv[2]))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The parent is gone: nobody is left to tell.
        sys.exit(2)

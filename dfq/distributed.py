"""Several processes on one job, as `torchrun` starts them: who am I, and are we all there."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Shards take as long as they take; a process that died is noticed by torchrun, not by a time-out.
_PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class World:
    """This process among its siblings.

    Attributes:
        rank: 0 .. size - 1 over all nodes; 0 leads.
        size: how many processes there are.
        local_rank: its number on this node: the GPU it takes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def share(self, value: Any) -> Any:
        """The leading process's `value`, for all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def world_from_environment() -> World:
    """What torchrun says of this process; alone where it was not started by it."""
    get = os.environ.get
    return World(int(get("RANK", 0)), int(get("WORLD_SIZE", 1)), int(get("LOCAL_RANK", 0)))


def device_for(world: World, device: str) -> str:
    """`device`, or with several processes and "auto" or "cuda" this process's own GPU."""
    if world.size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{world.local_rank % torch.cuda.device_count()}"
    return device


@contextlib.contextmanager
def process_group(world: World) -> Iterator[None]:
    """Join the siblings; nothing where there are none.

    The group only carries barriers and small objects, so gloo serves with GPUs as well.
    """
    if world.size == 1:
        yield
        return

    def stopped(*_: object) -> None:
        # torchrun ends every process when one dies; say so instead of a stack of its own.
        print(
            "error: another process of this run stopped, so this one does too; what is finished is "
            "kept, start the same command again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    before = signal.signal(signal.SIGTERM, stopped)
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)

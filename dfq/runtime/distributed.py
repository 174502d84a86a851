"""Several processes on one job: as `torchrun` starts them, on any number of nodes and GPUs.

They keep in touch through the key-value store that every `torch.distributed` job has. Gradients are
added up by a process group of their own, never made the default one: Ultralytics takes any default
group it finds for its own training, and waits in barriers that nobody else comes to.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from .launch import meet, number, place
from .processes import end_with_parent, heeding_sigterm

BEAT_SECONDS = 2.0
"""How often each process shows that it lives."""

SILENCE_SECONDS = 120.0
"""After so long without a sign of life, a process counts as dead."""

_POLL_SECONDS = 0.05

# Longer than the leading process writes a checkpoint while the others wait for its gradients.
_GROUP_TIMEOUT = timedelta(minutes=30)

_CANCELLED = "another process of this run died or the run was cancelled"
_STOPPED = "what is finished is kept; start the same command again to go on"

# Tells jobs of one process apart; all processes have the same ones in the same order.
_JOBS = itertools.count()

# The world of the `gathered` block this process is in, if it is in one.
_GATHERED: list[World] = []


class World:
    """This process among its siblings; without arguments, one that is alone.

    Args:
        rank: 0 .. size - 1 over all nodes; 0 leads.
        size: how many processes there are.
        local_rank: its number on this node: the GPU it takes.
        store: through which they keep in touch; needed where there are several.
        local_size: how many of them are on this node; None: all.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        store: dist.Store | None = None,
        local_size: int | None = None,
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.local_size = size if local_size is None else local_size
        self._store = store
        self._group: dist.ProcessGroup | None = None
        self._turn = 0
        self._look_at = 0.0
        self._sign = b""
        self._sign_at: float | None = None

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def barrier(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Wait for every process, however long it takes.

        Args:
            meanwhile: called now and then while waiting.

        Raises:
            UserError: where one of the others died or failed.
        """
        if self._store is None:
            return
        store, key = self._store, self._next("arrived")
        with _siblings_may_die():
            store.add(key, 1)
            self._wait(lambda: store.add(key, 0) >= self.size, meanwhile)

    def broadcast(self, value: Any) -> Any:
        """The leading process's `value` (picklable), for all.

        Raises:
            UserError: where one of the others died or failed.
        """
        if self._store is None:
            return value
        store, key = self._store, self._next("value")
        with _siblings_may_die():
            if self.is_main_process:
                store.set(key, pickle.dumps(value))
                return value
            self._wait(lambda: store.check([key]))
            return pickle.loads(store.get(key))

    def shard(self, count: int) -> slice:
        """This process's part of `count` things in a row: parts differ by one in length at most,
        and are empty where there are more processes than things."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all processes, the same bits in each; returns it.

        Args:
            tensor: dense, of one shape, type and kind of device in all processes, which must all
                call this in the same order.

        Raises:
            UserError: where one of the others died or failed.
        """
        if self._store is None or self.size == 1:
            return tensor
        with _siblings_may_die("another process"):
            if self._group is None:
                self._group = self._gather_group(tensor.device)
            work = self._group.allreduce([tensor])
            if tensor.device.type == "cpu":
                self._watch(work)
            work.wait()
        return tensor

    def _gather_group(self, device: torch.device) -> dist.ProcessGroup:
        assert self._store is not None
        # Waited for here, where one that died is noticed: making the group waits for its timeout.
        self.barrier()
        store = dist.PrefixStore("group", self._store)
        # NCCL refuses two processes on one GPU.
        if device.type == "cuda" and self.local_size <= torch.cuda.device_count():
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _GROUP_TIMEOUT
            return dist.ProcessGroupNCCL(store, self.rank, self.size, options)
        return dist.ProcessGroupGloo(store, self.rank, self.size, _GROUP_TIMEOUT)

    def _watch(self, work: dist.Work) -> None:
        """Return once `work` is through. It ends by itself where a process dies, but not where a
        machine falls silent."""
        pause = 1e-4
        while not work.is_completed():
            if pause >= _POLL_SECONDS:
                self._check_siblings()
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS)

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The leading process runs the block, then the others do: what needs a download or makes a
        folder happens once, and a mistake that would meet all is told once.

        Raises:
            SystemExit: with code 2 on the others, where the leading process failed.
        """
        if self.size == 1:
            yield
        elif not self.is_main_process:
            if not self.broadcast(None):
                self._acknowledge()
                raise SystemExit(2)
            yield
        else:
            try:
                yield
            except BaseException:
                self.broadcast(False)
                self._acknowledge()
                raise
            self.broadcast(True)

    def _acknowledge(self) -> None:
        """Let the others read that it failed before the leading process, and with it perhaps the
        store, is gone."""
        assert self._store is not None
        store, until = self._store, time.monotonic() + BEAT_SECONDS
        with contextlib.suppress(RuntimeError):
            read = store.add("read", 1)
            while self.is_main_process and read < self.size and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)
                read = store.add("read", 0)

    def leave(self) -> None:
        """Wait until all are through; the leading process, which may host the store, goes last."""
        if self._store is None:
            return
        self.barrier()
        store, key = self._store, self._next("left")
        with _siblings_may_die():
            store.add(key, 1)
            if self.is_main_process:
                self._wait(lambda: store.add(key, 0) >= self.size)

    def _next(self, name: str) -> str:
        self._turn += 1
        return f"{self._turn}/{name}"

    def _wait(
        self, condition: Callable[[], bool], meanwhile: Callable[[], None] | None = None
    ) -> None:
        # Asked again and again: a wait inside the library would keep signals from being noticed.
        while not condition():
            self._check_siblings()
            if meanwhile is not None:
                meanwhile()
            time.sleep(_POLL_SECONDS)

    def _check_siblings(self) -> None:
        assert self._store is not None
        if self._store.check(["failed"]):
            raise UserError(f"another process of this run failed; {_STOPPED}")
        # Each watches the next one, so that many processes do not flood the store; where one died,
        # the one that watches it fails, which all see.
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + BEAT_SECONDS
        rank = (self.rank + 1) % self.size
        sign = self._store.get(_alive(rank)) if self._store.check([_alive(rank)]) else b""
        if sign != self._sign or self._sign_at is None:
            self._sign, self._sign_at = sign, now
        elif now - self._sign_at > SILENCE_SECONDS:
            raise UserError(f"process {rank} of this run died; {_STOPPED}")


def _alive(rank: int) -> str:
    return f"alive-{rank}"


@contextlib.contextmanager
def _siblings_may_die(who: str = "the leading process") -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # What store and group say of a closed connection, in many words.
        raise UserError(f"{who} of this run died; {_STOPPED}") from error


@contextlib.contextmanager
def gathered() -> Iterator[World]:
    """The processes that torchrun started, for the time of the block; alone where it did not.

    Within such a block, another one gives the same processes.

    Raises:
        UserError: at the end of the block or in a wait within it, where one of the others died.
    """
    get = os.environ.get
    rank, size = place()
    local_rank, local_size = number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", size)
    if size == 1:
        yield World()
        return
    if _GATHERED:
        yield _GATHERED[-1]
        return
    # It is how torchrun ends all others when one process dies.
    with heeding_sigterm(f"error: told to stop, as {_CANCELLED}; {_STOPPED}", 2):
        end_with_parent(os.getppid())
        shared, rank, _ = meet()
        # torchrun can start all anew after a failure; they must not read what was left then.
        attempt = get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"dfq-{attempt}-{next(_JOBS)}", shared)
        world = World(rank, size, local_rank, store, local_size)
        ended = threading.Event()
        threading.Thread(target=_beat, args=(store, rank, ended), daemon=True).start()
        _GATHERED.append(world)
        try:
            yield world
            world.leave()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                store.set("failed", str(rank))
            raise
        finally:
            _GATHERED.pop()
            ended.set()


def _beat(store: dist.Store, rank: int, ended: threading.Event) -> None:
    # Without the store the wait that comes next says so.
    with contextlib.suppress(RuntimeError):
        for beat in itertools.count():
            store.set(_alive(rank), str(beat))
            if ended.wait(BEAT_SECONDS):
                return


def is_main_process() -> bool:
    """Whether this process is alone or the leading one."""
    return number("RANK", 0) == 0


def device_for(world: World, device: str) -> str:
    """`device`, or with several processes and "auto" or "cuda" this process's own GPU."""
    if world.size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{world.local_rank % torch.cuda.device_count()}"
    return device


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Within the block, torch computes on one thread if `device` is the CPU.

    Sums are split over threads, so their last bits depend on how many there are; what is computed
    within does not depend on the machine's cores, nor on how torchrun sets them.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

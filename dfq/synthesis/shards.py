"""Shards, the units of work: each is optimised, encoded and committed on its own."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from ..data.calibration_writer import CalibrationWriter
from ..runtime.malloc import freed_memory_kept
from .inversion import Batch, Inversion

ShardReport = Callable[[int, str, int, int, dict[str, float]], None]
"""Called now and then with shard, stage, iteration, iterations of the stage, and loss terms."""

QUEUE = 2
"""Shards that may wait to be written; the optimisation waits where the disk is slower than it."""


@dataclass(frozen=True)
class Plan:
    """How a set is cut into shards: what a shard holds follows from its index and these alone."""

    seed: int
    images: int
    batch_size: int

    @property
    def shards(self) -> int:
        return -(-self.images // self.batch_size)

    def first(self, index: int) -> int:
        """Number of the shard's first image within the set."""
        return index * self.batch_size

    def count(self, index: int) -> int:
        """How many images it holds; the last shard may be smaller."""
        return min(self.batch_size, self.images - self.first(index))


class ShardMaker(Protocol):
    """What makes shards: this process, or several."""

    def __call__(
        self, missing: list[int], report: ShardReport, written: Callable[[int], None]
    ) -> None:
        """Make and commit the shards `missing`; `written` is told of each once it is safe."""


class Committer:
    """Encodes and writes shards on a thread of its own, so that optimising the next one goes on.

    Leaving the context waits for what was submitted, also where an exception leaves it.
    """

    def __init__(self, writer: CalibrationWriter, plan: Plan, queue: int = QUEUE) -> None:
        self.writer, self.plan, self.queue = writer, plan, queue
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: deque[tuple[int, Future[None]]] = deque()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)

    def submit(self, index: int, batch: Batch) -> None:
        """Have a shard written; waits while as many others do as may."""
        if len(self._pending) >= self.queue:
            self._pending[0][1].exception()
        first = self.plan.first(index)
        future = self._pool.submit(
            self.writer.append, index, first, batch.images, batch.labels, batch.scores
        )
        self._pending.append((index, future))

    def written(self, *, wait: bool = False) -> list[int]:
        """Shards that became safe since the last call; with `wait`, all that were submitted.

        Raises:
            OSError: what writing one of them ran into, such as a full disk.
        """
        done = []
        while self._pending and (wait or self._pending[0][1].done()):
            index, future = self._pending.popleft()
            future.result()
            done.append(index)
        return done


def groups(indices: Iterable[int], plan: Plan, at_once: int) -> Iterator[list[int]]:
    """Shards of one size, at most so many together, in their order; one more is asked for only
    once it is needed."""
    group: list[int] = []
    for index in indices:
        if group and plan.count(index) != plan.count(group[0]):
            yield group
            group = []
        group.append(index)
        if len(group) == at_once:
            yield group
            group = []
    if group:
        yield group


def make_shards(
    inversion: Inversion,
    writer: CalibrationWriter,
    plan: Plan,
    indices: Iterable[int],
    report: ShardReport,
    written: Callable[[int], None],
    at_once: int = 1,
) -> None:
    """Make the shards `indices` in this process, in that order, `at_once` of one size side by side;
    both callbacks are called from the calling thread.

    Raises:
        UserError: where the loss stops being finite.
        OSError: where a shard cannot be written.
    """
    with freed_memory_kept(), Committer(writer, plan, max(QUEUE, at_once)) as committer:

        def progress(
            shard: int, stage: str, step: int, steps: int, values: dict[str, float]
        ) -> None:
            for safe in committer.written():
                written(safe)
            report(shard, stage, step, steps, values)

        for group in groups(indices, plan, at_once):
            reports = [functools.partial(progress, index) for index in group]
            count = plan.count(group[0])
            if len(group) == 1:
                batches = [inversion.batch(count, plan.seed, group[0], reports[0])]
            else:
                batches = inversion.batches(count, plan.seed, group, reports)
            for safe in committer.written():
                written(safe)
            for index, batch in zip(group, batches, strict=True):
                committer.submit(index, batch)
        for safe in committer.written(wait=True):
            written(safe)

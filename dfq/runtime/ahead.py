"""Reading ahead: batches are decoded by threads while the network works on those before them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Key = TypeVar("Key")
Part = TypeVar("Part")
Batch = TypeVar("Batch")

AHEAD = 2
"""Batches that are read, or being read, beside the one that is worked on."""

_MOST_THREADS = 8


def reading_threads() -> int:
    """How many threads decode images: one a core, as far as that is worth it."""
    return min(_MOST_THREADS, os.cpu_count() or 1)


def batches_of(keys: Sequence[Key], size: int) -> list[Sequence[Key]]:
    """The keys in their order, so many together; the last ones may be fewer."""
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def read_all(read: Callable[[Key], Part], keys: Sequence[Key]) -> list[Part]:
    """What `read` gives for each key, in their order, read on several threads.

    Raises:
        Exception: what the first of the keys that fails runs into; no thread is left then.
    """
    if len(keys) < 2:
        return [read(key) for key in keys]
    with ThreadPoolExecutor(reading_threads(), thread_name_prefix="read") as pool:
        try:
            return list(pool.map(read, keys))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def reading_ahead(
    groups: Sequence[Sequence[Key]],
    read: Callable[[Key], Part],
    join: Callable[[Sequence[Key], list[Part]], Batch],
    *,
    threads: int | None = None,
) -> Iterator[Iterator[Batch]]:
    """Batches in their order, each made by threads while those before it are worked on.

    Reading has to spend its time where other threads can run: decoding, resizing and copying do.
    However the block is left, no thread is left behind, and what was not begun is not read.

    Args:
        groups: the keys of each batch.
        read: gives what a batch is made of for a key; several threads call it at once.
        join: makes a batch of its keys and what was read for them, in their order.
        threads: None: as many as `reading_threads` says.

    Yields:
        The batches; what reading or joining one raises, is raised in its place: of several keys
        of a batch, the first one's.
    """
    pool = ThreadPoolExecutor(threads or reading_threads(), thread_name_prefix="read")

    def begin(group: Sequence[Key]) -> Future[Batch]:
        parts = [pool.submit(read, key) for key in group]
        # Begun after all of its parts, so what it waits for is on other threads, or done.
        return pool.submit(lambda: join(group, [part.result() for part in parts]))

    def batches() -> Iterator[Batch]:
        coming: deque[Future[Batch]] = deque()
        for group in groups:
            coming.append(begin(group))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

    try:
        yield batches()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

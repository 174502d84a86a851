"""Reading ahead: the order, how far, whose failure is told, and that no thread is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from dfq.errors import UserError
from dfq.runtime import ahead
from dfq.runtime.ahead import AHEAD, batches_of, read_all, reading_ahead


@pytest.fixture(autouse=True)
def _four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 4)


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def joined(group: Sequence[int], parts: list[str]) -> tuple[list[int], list[str]]:
    return list(group), parts


def stalled(event: threading.Event) -> Callable[[int], str]:
    """Reads 0 last of all."""

    def read(key: int) -> str:
        if key == 0:
            assert event.wait(30)
        if key == 3:
            event.set()
        return str(key)

    return read


def test_batches_keep_their_order_whichever_thread_is_first() -> None:
    groups = batches_of(range(7), 3)
    with reading_ahead(groups, stalled(threading.Event()), joined) as batches:
        assert list(batches) == [
            ([0, 1, 2], ["0", "1", "2"]),
            ([3, 4, 5], ["3", "4", "5"]),
            ([6], ["6"]),
        ]
    assert read_all(stalled(threading.Event()), range(5)) == ["0", "1", "2", "3", "4"]


def test_images_are_read_side_by_side() -> None:
    # Each waits until all four are being read.
    barrier = threading.Barrier(4, timeout=30)
    with reading_ahead([range(4)], lambda key: barrier.wait() >= 0, joined) as batches:
        assert list(batches) == [([0, 1, 2, 3], [True] * 4)]
    assert read_all(lambda key: barrier.wait() >= 0, range(4)) == [True] * 4


def test_a_few_batches_ahead_and_no_more_are_read() -> None:
    begun: list[int] = []
    done = threading.Semaphore(0)

    def read(key: int) -> int:
        begun.append(key)
        return key

    def join(group: Sequence[int], parts: list[int]) -> list[int]:
        done.release()
        return parts

    with reading_ahead(batches_of(range(100), 2), read, join) as batches:
        for number in range(3):
            assert next(batches) == [2 * number, 2 * number + 1]
            for _ in range(AHEAD + 1 if number == 0 else 1):
                assert done.acquire(timeout=30)
            assert sorted(begun) == list(range(2 * (number + 1 + AHEAD)))


def test_the_first_failure_of_a_batch_is_told_in_its_turn() -> None:
    later = threading.Event()

    def read(key: int) -> int:
        if key == 3:
            # Long after that of the image behind it.
            assert later.wait(30)
            raise UserError("image 3")
        if key == 4:
            later.set()
            raise UserError("image 4")
        return key

    with reading_ahead(batches_of(range(8), 2), read, joined) as batches:
        assert next(batches)[0] == [0, 1]
        with pytest.raises(UserError, match="image 3"):
            next(batches)
    later.clear()
    with pytest.raises(UserError, match="image 3"):
        read_all(read, range(8))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_was_not_begun_is_not_read_after_a_failure(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    hold = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            hold.set()
            super().shutdown(wait=wait)

    def slow(key: int) -> int:
        read.append(key)
        if key == 2:
            assert hold.wait(30)
        return key

    monkeypatch.setattr(ahead, "ThreadPoolExecutor", Pool)

    def fail() -> None:
        with reading_ahead(batches_of(range(100), 2), slow, joined, threads=1) as batches:
            next(batches)
            # The one thread is at the next batch, to whose second image it does not come.
            raise error

    with pytest.raises(error):
        fail()
    assert set(read) <= {0, 1, 2}

"""Processes that keep in touch; here, threads with one store between them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.forks import PATIENCE

from dfq.errors import UserError
from dfq.runtime import distributed
from dfq.runtime.distributed import World, device_for, gathered, is_main_process, one_thread

# Processes that are started, and killed.
pytestmark = pytest.mark.e2e


def together(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What `work` returns or raises in each of `size` processes."""
    store = dist.HashStore()
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(World(rank, size, rank, store))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other forever"
    return results


def test_alone() -> None:
    world = World()
    assert world.is_main_process
    assert world.broadcast("value") == "value"
    world.barrier()
    with world.main_process_first():
        pass
    world.leave()
    with gathered() as found:
        assert (found.rank, found.size) == (0, 1)


def test_a_barrier_waits_for_all() -> None:
    arrived, waited = [], []
    first_waits = threading.Event()

    def meanwhile() -> None:
        waited.append(1)
        if len(waited) > 2:
            first_waits.set()

    def work(world: World) -> int:
        # The others come when the first one has had time for something else.
        assert world.is_main_process or first_waits.wait(PATIENCE)
        arrived.append(world.rank)
        world.barrier(meanwhile if world.is_main_process else None)
        return len(arrived)

    assert together(3, work) == [3, 3, 3]


def test_the_leading_value_is_shared() -> None:
    def work(world: World) -> list[Any]:
        return [world.broadcast({"from": world.rank, "turn": turn}) for turn in range(3)]

    assert together(3, work) == [[{"from": 0, "turn": turn} for turn in range(3)]] * 3


def test_the_leading_process_goes_first() -> None:
    order = []

    def work(world: World) -> None:
        with world.main_process_first():
            time.sleep(0.2 if world.is_main_process else 0)
            order.append(world.rank)
        world.leave()

    assert together(3, work) == [None] * 3
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_where_the_leading_process_fails_the_others_end_without_a_word() -> None:
    entered = []

    def work(world: World) -> None:
        with world.main_process_first():
            entered.append(world.rank)
            raise UserError("no such file")

    first, *others = together(3, work)
    assert isinstance(first, UserError)
    assert [type(error) for error in others] == [SystemExit, SystemExit]
    assert {error.code for error in others} == {2}
    assert entered == [0]


class BeatClock:
    """Time that goes on with the beats of process 0: it is not taken for dead, however slow."""

    def __init__(self) -> None:
        self.store: dist.Store | None = None

    def monotonic(self) -> float:
        key = distributed._alive(0)
        if self.store is None or not self.store.check([key]):
            return 0.0
        return int(self.store.get(key)) * distributed.BEAT_SECONDS

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def test_who_falls_silent_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(distributed, "BEAT_SECONDS", 0.05)
    clock = BeatClock()
    monkeypatch.setattr(distributed, "time", clock)

    def work(world: World) -> None:
        clock.store = world._store
        if world.rank == 1:
            return
        ended = threading.Event()
        beat = threading.Thread(
            target=distributed._beat, args=(world._store, world.rank, ended), daemon=True
        )
        beat.start()
        try:
            world.barrier()
        except UserError:
            # As `gathered` does.
            world._store.set("failed", str(world.rank))  # type: ignore[union-attr]
            raise
        finally:
            ended.set()

    first, _, third = together(3, work)
    assert "process 1 of this run died" in str(first)
    assert "another process of this run failed" in str(third)
    assert "start the same command again" in str(first)


def test_a_lost_store_is_a_mistake_that_can_be_mended() -> None:
    class Gone:
        def add(self, *_: Any) -> int:
            raise dist.DistNetworkError("Connection reset by peer")

    with pytest.raises(UserError, match=r"the leading process of this run died; .*again"):
        World(1, 2, 1, Gone()).barrier()  # type: ignore[arg-type]


def test_who_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_main_process()
    monkeypatch.setenv("RANK", "0")
    assert is_main_process()
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()


@pytest.mark.parametrize(
    ("size", "local_rank", "asked", "gpus", "expected"),
    [
        (1, 0, "auto", 4, "auto"),
        (1, 0, "cuda", 4, "cuda"),
        (4, 3, "auto", 4, "cuda:3"),
        (4, 3, "cuda", 2, "cuda:1"),
        (4, 3, "cuda:0", 4, "cuda:0"),
        (4, 3, "cpu", 4, "cpu"),
        (4, 3, "auto", 0, "auto"),
    ],
)
def test_each_process_has_its_gpu(
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    local_rank: int,
    asked: str,
    gpus: int,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_for(World(local_rank, size, local_rank), asked) == expected


def test_one_thread_on_a_cpu_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(KeyboardInterrupt), one_thread(torch.device("cpu")):
            assert torch.get_num_threads() == 1
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 2
        with one_thread(torch.device("cuda:0")):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_parts_make_up_the_whole() -> None:
    for size, count in ((1, 5), (2, 5), (3, 7), (4, 4), (5, 3), (3, 0)):
        parts = [list(range(count))[World(rank, size).shard(count)] for rank in range(size)]
        assert [i for part in parts for i in part] == list(range(count))
        lengths = {len(part) for part in parts}
        assert max(lengths) - min(lengths) <= 1


def test_adding_up_gives_each_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 1000, generator=generator)

    def work(world: World) -> tuple[torch.Tensor, torch.Tensor]:
        return world.all_reduce_sum(values[world.rank].clone()), world.all_reduce_sum(
            torch.ones(2, 2)
        )

    found = together(3, work)
    for first, second in found:
        assert torch.equal(first, found[0][0])
        assert torch.allclose(first, values.sum(dim=0), atol=1e-6)
        assert torch.equal(second, torch.full((2, 2), 3.0))
    # The group is nobody else's business: Ultralytics would take a default one for its own.
    assert not dist.is_initialized()


def test_adding_up_alone_changes_nothing() -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert World().all_reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]


def test_one_that_is_gone_ends_a_sum_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its connections are closed, which is noticed without waiting for a sign of life.
    monkeypatch.setattr(distributed, "SILENCE_SECONDS", PATIENCE)

    def work(world: World) -> None:
        world.all_reduce_sum(torch.ones(3))
        if world.rank == 1:
            world._group = None  # closes its connections
            return
        world.all_reduce_sum(torch.ones(3))

    first, second = together(2, work)
    assert second is None
    assert isinstance(first, UserError)
    assert "of this run died; what is finished is kept" in str(first)


def test_a_world_within_a_world_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two of them in one process would wait for siblings that are already in the first.
    store = dist.HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(store, 0, 2)]))
    monkeypatch.setattr(World, "leave", lambda _: None)
    with gathered() as outer:
        assert outer.size == 2
        with gathered() as inner:
            assert inner is outer
        with gathered() as inner:
            assert inner is outer

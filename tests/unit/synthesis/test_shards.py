"""Cutting a set into shards, and writing them while the next one is made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import PATIENCE

from dfq.data.calibration_writer import CalibrationWriter
from dfq.synthesis.inversion import Batch
from dfq.synthesis.shards import QUEUE, Committer, Plan, groups, make_shards


def batch(count: int = 1) -> Batch:
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    return Batch(images, [torch.zeros(0, 5)] * count, [torch.zeros(0)] * count)


class Inversion:
    """Makes black images, and reports once halfway."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def batch(self, count: int, seed: int, shard: int, report: Any) -> Batch:
        report("full", 1, 2, {"tv": 0.5})
        self.made.append(shard)
        return batch(count)


class Writer:
    """Writes nothing, and not before it is let."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.let = threading.Event()
        self.error = error
        self.written: list[int] = []
        self.threads: set[int] = set()

    def append(self, index: int, *_: Any) -> None:
        assert self.let.wait(20)
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        self.written.append(index)


PLAN = Plan(seed=3, images=10, batch_size=4)


def test_a_plan_covers_every_image_once() -> None:
    for images in range(1, 12):
        plan = Plan(0, images, 4)
        found = [
            plan.first(index) + offset
            for index in range(plan.shards)
            for offset in range(plan.count(index))
        ]
        assert found == list(range(images))


def test_shards_are_written_while_the_next_is_made() -> None:
    writer = Writer()
    with Committer(writer, PLAN) as committer:  # type: ignore[arg-type]
        for index in range(QUEUE):
            committer.submit(index, batch())
        assert committer.written() == []
        # One more has to wait for room.
        blocked = threading.Thread(target=committer.submit, args=(QUEUE, batch()), daemon=True)
        blocked.start()
        blocked.join(0.1)
        assert blocked.is_alive()
        writer.let.set()
        blocked.join(PATIENCE)
        assert committer.written(wait=True) == list(range(QUEUE + 1))
    assert writer.threads
    assert threading.get_ident() not in writer.threads


def test_what_was_submitted_is_written_whatever_happens() -> None:
    writer = Writer()
    writer.let.set()
    committer = Committer(writer, PLAN)  # type: ignore[arg-type]
    with contextlib.suppress(KeyboardInterrupt), committer:
        committer.submit(0, batch())
        committer.submit(1, batch())
        raise KeyboardInterrupt
    assert writer.written == [0, 1]


def test_a_full_disk_stops_the_work() -> None:
    writer, inversion = Writer(OSError(28, "No space left on device")), Inversion()
    writer.let.set()
    reports: list[Any] = []
    with pytest.raises(OSError, match="No space left"):
        make_shards(
            inversion,  # type: ignore[arg-type]
            writer,  # type: ignore[arg-type]
            Plan(0, 1000, 1),
            range(1000),
            lambda *values: reports.append(values),
            lambda _: pytest.fail("nothing was written"),
        )
    assert len(inversion.made) <= QUEUE + 2


def test_make_shards(tmp_path: Path) -> None:
    writer = CalibrationWriter(tmp_path, {"seed": 0}, ["a"], PLAN.shards)
    reports: list[Any] = []
    written: list[int] = []
    inversion = Inversion()
    make_shards(
        inversion,  # type: ignore[arg-type]
        writer,
        PLAN,
        [2, 0],
        lambda *values: reports.append(values),
        written.append,
    )
    assert inversion.made == [2, 0]
    assert written == [2, 0]
    assert writer.missing() == [1]
    assert [writer.recorded(index) for index in range(3)] == [True, False, True]
    assert reports == [(index, "full", 1, 2, {"tv": 0.5}) for index in (2, 0)]
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == [f"{number:08d}.png" for number in (0, 1, 2, 3, 8, 9)]


def test_shards_of_one_size_go_together() -> None:
    # The third is smaller.
    asked: list[int] = []

    def indices() -> Iterator[int]:
        for index in (0, 1, 2, 0, 1, 0):
            asked.append(index)
            yield index

    found = groups(indices(), PLAN, 2)
    assert next(found) == [0, 1]
    # No more were asked for, which another process could have made.
    assert asked == [0, 1]
    assert list(found) == [[2], [0, 1], [0]]

"""How long a synthesis will still take, by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.tiny_detector import tiny_detector

from dfq.synthesis import pace
from dfq.synthesis.inversion import Inversion, Stage
from dfq.synthesis.pace import Pace
from dfq.synthesis.settings import LabelStage, Synthesis
from dfq.synthesis.shards import Plan

STAGES = [Stage("labels", 40, 160), Stage("small", 110, 320), Stage("full", 90, 640)]
PLAN = Plan(seed=0, images=70, batch_size=32)
"""Three shards, the last one of 6 images."""

COST = {"labels": 0.002, "small": 0.007, "full": 0.03}
"""Seconds of an iteration and image, not quite as the pixels have it."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def work(found: Pace, clock: Clock, shard: int, every: int = 4) -> Iterator[None]:
    """A shard goes through its stages; yields after each report."""
    for stage in STAGES:
        for step in range(stage.iterations):
            clock.now += COST[stage.name] * PLAN.count(shard)
            if step == 1 or step % every == 0 or step == stage.iterations - 1:
                found.report(shard, stage.name, step + 1)
                yield
    found.written(shard)


def truth(images: int) -> float:
    return images * sum(COST[stage.name] * stage.iterations for stage in STAGES)


def test_known_from_the_second_iteration_on(clock: Clock) -> None:
    found = Pace(STAGES, PLAN, [0, 1, 2], 1)
    assert found.left() is None
    steps = work(found, clock, 0)
    next(steps)
    assert found.left() is None, "the first iteration is none to judge by"
    next(steps)
    left = found.left()
    # By the pixels of the first stage, before anything was seen of the others.
    assert left == pytest.approx(truth(70), rel=0.3)


def test_it_neither_grows_nor_jumps_once_all_stages_are_known(clock: Clock) -> None:
    found = Pace(STAGES, PLAN, [0, 1, 2], 1)
    begun = clock.now
    for _ in work(found, clock, 0):
        pass
    before = found.left()
    assert before is not None
    assert before == pytest.approx(truth(38), rel=0.02)
    for shard in (1, 2):
        for _ in work(found, clock, shard):
            left = found.left()
            assert left is not None
            assert left < before
            # What is left and what has passed are the whole, all the time.
            passed = clock.now - begun
            assert passed + left == pytest.approx(truth(70), rel=0.02)
            before = left
    assert found.left() == 0
    assert before < 2


def test_several_processes_share_the_work(clock: Clock) -> None:
    plan = Plan(0, 8, 2)
    found = Pace([Stage("full", 10, 64)], plan, [0, 1, 2, 3], 2)
    for step in (1, 2):
        clock.now += 4.0
        for shard in (0, 1):
            found.report(shard, "full", step)
    # 4 s an iteration of each of the two that run side by side; 8 are left of these, 10 of the
    # other two.
    assert found.left() == pytest.approx((8 + 8 + 10 + 10) * 4 / 2)
    for shard in (0, 1, 2):
        found.written(shard)
    # One shard is left, which a second process does not make any faster.
    assert found.left() == pytest.approx(40)


def test_a_resumed_set_counts_what_is_missing(clock: Clock) -> None:
    found = Pace(STAGES, PLAN, [2], 1)
    steps = work(found, clock, 2)
    for _ in range(3):
        next(steps)
    assert found.left() == pytest.approx(truth(6), rel=0.35)
    # Reports of shards that nobody asked for change nothing.
    found.report(0, "full", 3)
    found.report(2, "nothing of the kind", 3)
    assert found.left() == pytest.approx(truth(6), rel=0.35)


def test_the_stages_are_those_that_are_run() -> None:
    stage = LabelStage(image_size=64, iterations=4, updates=2)

    def stages(**changes: object) -> list[tuple[str, int, int]]:
        chosen = {"image_size": 128, "iterations": 10, "label_stage": stage, **changes}
        made = Inversion(tiny_detector(), Synthesis(**chosen))  # type: ignore[arg-type]
        return [(s.name, s.iterations, s.side) for s in made.stages()]

    assert stages(multires=0.4) == [("labels", 4, 64), ("small", 4, 64), ("full", 6, 128)]
    assert stages(multires=0) == [("labels", 4, 64), ("full", 10, 128)]
    assert stages(labels="multi", multires=0.4) == [("small", 4, 64), ("full", 6, 128)]
    assert stages(labels="multi", iterations=0) == []

"""Calls are timed in turns, by the clock that is asked for."""

from __future__ import annotations

import pytest

from dfq.export.latency import in_turns


def test_turns_are_timed_by_the_clock_given() -> None:
    now, order = 0.0, list[str]()

    def taking(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        order.append(name)

    runs = [lambda: taking("a", 0.25), lambda: taking("b", 1.0)]
    first, second = in_turns(runs, rounds=2, seconds=0.5, clock=lambda: now)
    assert first == pytest.approx([0.25, 0.25])
    assert second == pytest.approx([1, 1])
    # Twice each to begin with; then two calls of the one fill a turn, and one of the other.
    assert order == list("aabb" + "aab" * 2)


def test_a_call_too_short_for_the_clock() -> None:
    ticks = iter([0.0, 0.0])
    assert in_turns([lambda: None], rounds=0, clock=lambda: next(ticks)) == [[]]

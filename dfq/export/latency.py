"""How long a file takes in its runtime, beside another one: in turns, in one run, as a ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ROUNDS = 15
"""Turns that each file gets: enough for a median that a busy machine does not move."""

SECONDS_A_TURN = 0.1


@dataclass(frozen=True)
class Latency:
    """Two files in one runtime, batch 1.

    Attributes:
        image_size: side in pixels.
        threads: that the runtime was given; None: its own choice.
        reference_ms, file_ms: medians over the turns, milliseconds an image.
        ratio: median of the turns' own ratios, file to reference: below 1 the file is faster.
    """

    image_size: int
    threads: int | None
    reference_ms: float
    file_ms: float
    ratio: float

    @property
    def throughput(self) -> float:
        """Images a second, one after the other."""
        return 1000 / self.file_ms

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "images_per_second": self.throughput}


def in_turns(
    runs: Sequence[Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS_A_TURN,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Time calls in turns, so that what else the machine does falls on all alike.

    Args:
        runs: what to time.
        rounds: turns of each.
        seconds: a turn repeats its call for about so long.
        clock: in seconds; with `time.process_time` others on the same cores take no part.

    Returns:
        Of each, the seconds a call took in each turn, a median within the turn.
    """
    counts = []
    for run in runs:
        run()
        start = clock()
        run()
        counts.append(max(1, round(seconds / max(clock() - start, 1e-9))))
    medians: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for place, (run, count) in enumerate(zip(runs, counts, strict=True)):
            times = []
            for _ in range(count):
                start = clock()
                run()
                times.append(clock() - start)
            medians[place].append(statistics.median(times))
    return medians

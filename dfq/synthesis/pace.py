"""How long a synthesis will still take, known from its first iterations on."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .inversion import Stage
from .shards import Plan

_NEW = 0.3
"""What the latest measurement counts against those before it."""


class Pace:
    """Learns what an iteration of each stage takes, and adds up those that are left.

    A stage that was not seen yet is taken to cost what another one does for as many pixels.

    Args:
        stages: what every shard goes through.
        plan: of the set.
        shards: those to be made here.
        processes: how many shards are made at a time.
    """

    def __init__(
        self, stages: Sequence[Stage], plan: Plan, shards: Sequence[int], processes: int
    ) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.processes = processes
        # By shard and stage, iterations that are left.
        self._left = {shard: {stage.name: stage.iterations for stage in stages} for shard in shards}
        self._images = {shard: plan.count(shard) for shard in shards}
        # By stage, seconds of an iteration and image.
        self._cost: dict[str, float] = {}
        # By shard, the stage, iteration and time of its last report.
        self._seen: dict[int, tuple[str, int, float]] = {}

    def report(self, shard: int, stage: str, step: int) -> None:
        """A shard is through with iteration `step` (from 1) of a stage."""
        now = time.monotonic()
        before = self._seen.get(shard)
        self._seen[shard] = (stage, step, now)
        if shard not in self._left or stage not in self.stages:
            return
        for name in self.stages:
            if name == stage:
                break
            self._left[shard][name] = 0
        self._left[shard][stage] = self.stages[stage].iterations - step
        if before is None or before[0] != stage or step <= before[1]:
            return
        cost = (now - before[2]) / (step - before[1]) / self._images[shard]
        known = self._cost.get(stage, cost)
        self._cost[stage] = known + _NEW * (cost - known)

    def written(self, shard: int) -> None:
        """A shard is done."""
        self._left.pop(shard, None)
        self._seen.pop(shard, None)

    def left(self) -> float | None:
        """Seconds to the end; None while nothing was measured."""
        if not self._cost:
            return None
        costs = {name: self._cost_of(stage) for name, stage in self.stages.items()}
        shard_seconds = [
            sum(costs[name] * steps for name, steps in left.items()) * self._images[shard]
            for shard, left in self._left.items()
        ]
        # The last shards are not made by more processes than there are of them.
        return max(sum(shard_seconds) / self.processes, max(shard_seconds, default=0.0))

    def _cost_of(self, stage: Stage) -> float:
        if stage.name in self._cost:
            return self._cost[stage.name]
        nearest = min(
            (known for name, known in self.stages.items() if name in self._cost),
            key=lambda known: abs(known.side - stage.side),
        )
        return self._cost[nearest.name] * (stage.side / nearest.side) ** 2

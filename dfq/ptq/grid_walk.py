"""One quantizer of activations after another, in the order they run: each grid is put where the
*network's predictions* are closest to the float network's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..graph.execution import last_called_by_end
from ..models.base import Model
from ..quantization.calibration import run_observers
from ..quantization.quantizers import Quantizer
from ..quantization.traversal import float_mode
from .block_cache import BlockOutputCache

Grid = tuple[Tensor, Tensor]
"""Step size and zero point of a quantizer, `(channels,)` each."""

Tried = Callable[[Quantizer, Tensor], Sequence[Grid]]
"""Of a quantizer and the values `(n,)` that reach it: the grids to try, the present one first."""

PredictionDistance = Callable[[Any, Any], Tensor]
"""Of the student's raw predictions for a batch from the teacher's: a scalar, to be summed."""


class GridWalk:
    """Quantizers whose grids are looked for; made by `walking`, within which it is good.

    Args:
        quantizers: by name, per tensor, in the order they run; all off.
        values: by name, those that reach each, `(n,)`.
        ended: by name, the blocks that no quantizer after it has a say in; with None, those that
            none has.
        network: the student over the batches.
        expected: the teacher's raw predictions for each.
        apart: how far those of a batch are from each other.
    """

    def __init__(
        self,
        quantizers: dict[str, Quantizer],
        values: Mapping[str, Tensor],
        ended: Mapping[str | None, Sequence[str]],
        network: BlockOutputCache,
        expected: Sequence[Any],
        apart: PredictionDistance,
    ) -> None:
        self.quantizers = quantizers
        self._values, self._ended = values, ended
        self._network, self._expected, self._apart = network, expected, apart
        self._finish(None)

    def _finish(self, name: str | None) -> None:
        for block in self._ended.get(name, ()):
            self._network.finish(block)

    def distance(self) -> float:
        """How far the predictions are from the teacher's, with the network as it is."""
        distances = [
            self._apart(self._network.run(number), wanted)
            for number, wanted in enumerate(self._expected)
        ]
        return float(torch.stack(distances).sum())

    def enable(self, enabled: bool) -> None:
        """Turn all the quantizers on or off."""
        for quantizer in self.quantizers.values():
            quantizer.enabled = enabled

    def grids(self) -> dict[str, Grid]:
        """The present ones, by name."""
        return {name: (q.scale, q.zero_point.clone()) for name, q in self.quantizers.items()}

    def restore(self, grids: Mapping[str, Grid]) -> None:
        """Go back to what `grids` gave."""
        for name, grid in grids.items():
            self.quantizers[name].initialise(*grid)

    def move(
        self,
        tried: Tried,
        *,
        stay_on: bool,
        slack: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Give each quantizer, all those after it off, the grid that keeps the predictions closest.

        Args:
            tried: what to choose from; of equally good ones, the first.
            stay_on: whether a quantizer is on while those after it are looked at, as the network
                will be; else it is off again, and each sees a network that is float but for it.
            slack: of the grids whose distance is at most so many times the least, the one with the
                finest step is chosen where this is above 1.
            progress: called with quantizers done and quantizers in all.
        """
        for done, (name, quantizer) in enumerate(self.quantizers.items()):
            scored_grids = []
            quantizer.enabled = True
            for grid in tried(quantizer, self._values[name]):
                quantizer.initialise(*grid)
                scored_grids.append((self.distance(), grid))
            least, best = min(scored_grids, key=lambda scored: scored[0])
            # No distance, or nothing but rounding errors of one, tells no grid from another.
            if slack > 1 and least > 0:
                good = [grid for distance, grid in scored_grids if distance <= slack * least]
                best = min(good, key=lambda grid: float(grid[0]))
            quantizer.initialise(*best)
            quantizer.enabled = stay_on
            self._finish(name)
            if progress is not None:
                progress(done + 1, len(self.quantizers))


@contextmanager
def walking(
    student: Model,
    teacher: Model,
    batches: Sequence[Tensor],
    quantizers: Mapping[str, Quantizer],
    apart: PredictionDistance,
) -> Iterator[GridWalk]:
    """A context in which the student computes in float but for the quantizers that are turned on.

    Args:
        student: quantizers inserted and calibrated, weights still those of the teacher.
        teacher: the float network it is a copy of, folded.
        batches: images `(n, 3, h, w)` in [0, 1].
        quantizers: by name, as `activation_quantizers` gives them; those that the pass over a
            single image does not get to are left out.
        apart: how far predictions are from each other.
    """
    with float_mode(student.module), student.shared_proposals(teacher, batches):
        values = run_observers(student, batches)
        order, ends = last_called_by_end(
            quantizers,
            {name: student.module.get_submodule(name) for name in student.blocks()},
            lambda: student.raw(batches[0][:1]),
        )
        ended = defaultdict[str | None, list[str]](list)
        for block, last in ends.items():
            ended[last].append(block)
        expected = [teacher.raw(batch) for batch in batches]
        with BlockOutputCache.of(student, batches, list(ends)) as network:
            yield GridWalk(
                {name: quantizers[name] for name in order}, values, ended, network, expected, apart
            )

"""The loop over the iterations of a stage, for the shards that are made side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..errors import UserError
from ..models.base import Targets
from .draws import Draws, filled_up, moved, room_for
from .iteration import Inputs, Iteration, Recorded, Terms, recorder
from .loss_weighting import MEASURE_EVERY, WEIGHTINGS
from .multiscale import MultiscaleAdam

if TYPE_CHECKING:
    from .inversion import Inversion

Report = Callable[[str, int, int, dict[str, float]], None]
"""Called now and then with stage, iteration, iterations of the stage, and loss terms."""

LAST_STAGE = "full"
"""Of the images at their full size."""


class Loop:
    """Adam with cosine decay on several scales, pixels clamped to [0, 1] after each step.

    Args: see `Inversion.optimise`.
    """

    def __init__(
        self,
        inversion: Inversion,
        images: Tensor,
        labels: Sequence[Tensor],
        iterations: int,
        learning_rate: float,
        generators: Sequence[Generator],
        stage: str,
    ) -> None:
        settings, device = inversion.settings, inversion.detector.device
        self.inversion, self.iterations, self.stage = inversion, iterations, stage
        self.shards, self.static = len(generators), inversion.static
        # In planes, in which neighbours and mirror images are quickest to find.
        pixels = images.to(device).clone(memory_format=torch.contiguous_format).requires_grad_()
        self.pixels = pixels
        self.combine = WEIGHTINGS[settings.balance](settings.weights, self.shards)
        self.iteration = Iteration(
            pixels,
            MultiscaleAdam(pixels, settings.scales),
            self.combine,
            inversion._parts,
            inversion.seen_in,
            darkens=settings.weights.l2 > 0,
        )
        self.recorded = None
        record = recorder(device)
        if self.static and inversion.record and record is not None:
            self.recorded = Recorded(self.iteration, record)
        settles = stage == LAST_STAGE and inversion.statistics is not None
        self.begin = iterations - round(settings.settle * iterations) if settles else iterations
        self.draws = Draws(
            generators,
            len(images) // self.shards,
            images.shape[2],
            flip=settings.flip,
            erase=settings.erase,
            iterations=iterations,
            begin=self.begin,
            device=device,
            # Convolutions that swing draw in between.
            ahead=1 if device.type == "cpu" or settings.techniques.swing else max(iterations, 1),
        )
        peak = learning_rate * inversion.start.pace
        self.rates: Sequence[float | Tensor] = [
            peak * 0.5 * (1 + math.cos(math.pi * step / iterations)) for step in range(iterations)
        ]
        if self.recorded is not None:
            self.rates = list(moved(torch.tensor(self.rates), device))
        self._room = 0
        self.targets = self._targets(labels)

    def _targets(self, labels: Sequence[Tensor]) -> Targets:
        device = self.inversion.detector.device
        if not self.static:
            return Targets.from_per_image(labels).to(device)
        self._room = max(self._room, room_for(labels, self.shards))
        return Targets(moved(filled_up(labels, self.shards, self._room).data, device))

    def run(
        self,
        after: Callable[[int, Tensor], list[Tensor] | None] | None,
        reports: Sequence[Report] | None,
    ) -> Tensor:
        """Run all iterations; returns the images `(n, 3, h, w)` in [0, 1]."""
        every = max(1, self.iterations // 20)
        for step in range(self.iterations):
            if step == self.begin:
                self.combine.settle()
            terms = self._iterate(step)
            # The second one as well: from it on, it is known how long one takes.
            if step % every == 0 or step in (1, self.iterations - 1):
                self._tell(step, terms, reports)
            if after is not None:
                changed = after(step, self.pixels.detach())
                if changed is not None:
                    self.targets = self._targets(changed)
        return self.pixels.detach()

    def _iterate(self, step: int) -> Terms:
        flipped, erased = self.draws.at(step)
        inputs = Inputs(self.rates[step], flipped, erased, self.targets)
        if self.recorded is None:
            return self.iteration(inputs, step)
        kind = step % MEASURE_EVERY == 0, step >= self.begin
        terms = self.recorded(inputs, step, kind)
        if self.recorded.failed is not None:
            self.inversion.give_up_recording(self.recorded.failed)
        return terms

    def _tell(self, step: int, terms: Terms, reports: Sequence[Report] | None) -> None:
        rows = {name: term.detach().reshape(-1).tolist() for name, term in terms.items()}
        for shard in range(self.shards):
            values = {name: row[shard] for name, row in rows.items()}
            if not math.isfinite(sum(values.values())):
                raise UserError(
                    f"synthesis: the loss is not finite at iteration {step} of stage "
                    f"'{self.stage}' ({values}); lower synthesis.learning_rate"
                )
            if reports is not None:
                reports[shard](self.stage, step + 1, self.iterations, values)

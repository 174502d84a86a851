"""What an iteration draws, and labels in tensors of a fixed shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ..models.base import Targets
from .augmentation import random_erasing

LEAST = 64
"""Rows for labels of a shard; where they do not do, twice as many, and so on."""


class Draws:
    """Which images each iteration mirrors, and what it blanks of them.

    Every shard draws for itself, from its own generator, in the order of the iterations.

    Args:
        generators: of the shards.
        count: images of a shard.
        size: their side, pixels.
        flip, erase: probabilities; 0: nothing is drawn.
        iterations: how many there are.
        begin: the iteration from which on nothing is blanked.
        device: where what is drawn goes.
        ahead: so many iterations are drawn at once, and moved together.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        count: int,
        size: int,
        *,
        flip: float,
        erase: float,
        iterations: int,
        begin: int,
        device: torch.device,
        ahead: int,
    ) -> None:
        self.generators, self.count, self.size = generators, count, size
        self.flip, self.erase = flip, erase
        self.iterations, self.begin = iterations, begin
        self.device, self.ahead = device, ahead
        self._flipped: list[Tensor] = []
        self._erased: list[Tensor] = []
        self._first = 0

    def at(self, step: int) -> tuple[Tensor | None, Tensor | None]:
        """Of an iteration, asked for in their order: bool `(shards * n,)`, which images are
        mirrored, and int32 `(shards * n, 4)`, see `random_erasing`; None where nothing is."""
        if step % self.ahead == 0:
            self._draw(step)
        index = step - self._first
        erases = self.erase > 0 and step < self.begin
        return (
            self._flipped[index] if self.flip > 0 else None,
            self._erased[index] if erases else None,
        )

    def _draw(self, first: int) -> None:
        flipped, erased = [], []
        for step in range(first, min(first + self.ahead, self.iterations)):
            flips, rectangles = [], []
            for generator in self.generators:
                if self.flip > 0:
                    flips.append(torch.rand(self.count, generator=generator) < self.flip)
                if self.erase > 0 and step < self.begin:
                    rectangles.append(random_erasing(self.count, self.size, self.erase, generator))
            flipped += [torch.cat(flips)] if flips else []
            erased += [torch.cat(rectangles)] if rectangles else []
        self._first = first
        self._flipped, self._erased = self._moved(flipped), self._moved(erased)

    def _moved(self, drawn: list[Tensor]) -> list[Tensor]:
        if not drawn or self.device.type == "cpu":
            return drawn
        return list(moved(torch.stack(drawn), self.device))


def moved(values: Tensor, device: torch.device) -> Tensor:
    """`values`, of any shape and dtype, on another device; a copy to a GPU is not waited for."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def filled_up(labels: Sequence[Tensor], shards: int, most: int) -> Targets:
    """Labels as `Detector.shard_losses` takes them: `most` rows a shard.

    Args:
        labels: per image `(n_i, 5)`, of all shards one after the other.
        shards: how many.
        most: labels of a shard at least.
    """
    count, rows = len(labels) // shards, []
    for shard in range(shards):
        first = shard * count
        data = Targets.from_per_image(labels[first : first + count]).data
        number = torch.arange(most - len(data))
        # Scattered: it is added up all the same, and what falls on one place waits in line.
        place = torch.stack([(number * 37 % 101) / 101, (number * 53 % 97) / 97], dim=1)
        filler = torch.cat(
            [
                (-1 - first - number % count)[:, None],
                torch.zeros(len(number), 1),
                place,
                torch.full((len(number), 2), 0.1),
            ],
            dim=1,
        )
        rows += [torch.cat([data[:, :1] + first, data[:, 1:]], dim=1), filler]
    return Targets(torch.cat(rows))


def room_for(labels: Sequence[Tensor], shards: int) -> int:
    """Rows a shard that hold labels `(n_i, 5)` an image, of all shards one after the other: `LEAST`
    times a power of two."""
    count = len(labels) // shards
    most = max(
        sum(len(label) for label in labels[first : first + count])
        for first in range(0, len(labels), count)
    )
    return LEAST << max(-(-most // LEAST) - 1, 0).bit_length()

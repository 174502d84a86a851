"""Colour and contrast that images start with, so that the first BatchNorm is met from the start.

Before the first BatchNorm a network is linear: of a flat image its mean follows from the colour,
and the variance of noise about it from its contrast. A network that was trained on dark or foggy
images is far from noise over the whole range, and what has to be undone leaves its traces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from .augmentation import initial_images
from .losses.batchnorm import BatchNormStatistics

RIDGE = 1e-3
"""Pull of the colour towards grey, in mean squares of what a unit of colour does."""

FAINTEST, STRONGEST = 0.01, 1.0
"""Least and largest contrast, of noise over [0, 1]."""

USUAL_CONTRAST = 0.4
"""That networks for photographs start with."""

_PROBE = 0.25
"""Contrast of the noise that is measured."""


@dataclass(frozen=True)
class Start:
    """Noise that images start from.

    Attributes:
        kind: see `initial_images`.
        colour: mean, `(3,)` in [0, 1], on the CPU.
        contrast: factor of the noise about it; 1: over the whole range.
    """

    kind: str
    colour: Tensor = field(default_factory=lambda: torch.full((3,), 0.5))
    contrast: float = 1.0

    def noise(self, count: int, side: int, generator: Generator) -> Tensor:
        """Images `(count, 3, side, side)` in [0, 1]."""
        noise = initial_images(count, side, self.kind, generator)
        return (self.colour[:, None, None] + self.contrast * (noise - 0.5)).clamp_(0, 1)

    @property
    def pace(self) -> float:
        """Factor of the learning rate, at most 1: steps that move photographs well are noise to
        dark or foggy images."""
        return min(1.0, self.contrast / USUAL_CONTRAST)


@torch.no_grad()
def matched_start(
    statistics: BatchNormStatistics, run: Callable[[Tensor], object], side: int, kind: str
) -> Start:
    """Colour and contrast of noise with which the first BatchNorm sees what it saw in training.

    Args:
        statistics: of the network.
        run: one forward pass on images `(n, 3, side, side)` in [0, 1].
        side: pixels.
        kind: of noise, see `initial_images`.

    Returns:
        What to start from.
    """

    def first_layer_moments(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with statistics:
            run(images)
            mean, var, expected, spread = (v.double().cpu() for v in statistics.first_layer())
        return mean, var, expected, spread.clamp_min(1e-12)

    flat = torch.zeros(1, 3, side, side)
    black, _, expected, spread = first_layer_moments(flat)
    columns = []
    for colour in range(3):
        primary = flat.clone()
        primary[:, colour] = 1
        columns.append((first_layer_moments(primary)[0] - black) / spread.sqrt())
    effect = torch.stack(columns, dim=1)
    wanted = (expected - black) / spread.sqrt() - effect.sum(dim=1) / 2
    square = effect.T @ effect
    square += RIDGE * square.diagonal().mean().clamp_min(1e-12) * torch.eye(3, dtype=square.dtype)
    mean = (torch.linalg.solve(square, effect.T @ wanted) + 0.5).clamp(0.02, 0.98).float()
    noise = initial_images(4, side, kind, Generator().manual_seed(0)) - 0.5
    _, var, _, _ = first_layer_moments(mean[:, None, None] + _PROBE * noise)
    ratio = (spread / var.clamp_min(1e-12)).log().mean().exp()
    contrast = _PROBE * float(ratio.sqrt())
    return Start(kind, mean, min(max(contrast, FAINTEST), STRONGEST))

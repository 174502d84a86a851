"""Variants of the optimisation, off unless a recipe turns them on: where each one acts.

`Techniques` holds those of one detector. The loop calls it at four places: `view` before the
network sees the images, `watching` around its passes, `distances` on the BatchNorm term, and
`gradient` before the optimizer's step. With everything off, they hand back what they were given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..data.augment import augment
from ..models.base import Detector, Targets
from .losses.batchnorm import BatchNormStatistics
from .losses.image_statistics import ImageStatistics
from .settings import Techniques as Settings


class Techniques:
    """The variants that a recipe turns on.

    Args:
        settings: the section `synthesis.techniques`.
        detector: the teacher as the loop runs it.
        statistics: of its BatchNorm layers; None where there are none.
        form: of the BatchNorm distances, see `Synthesis.bn_form`.
    """

    def __init__(
        self,
        settings: Settings,
        detector: Detector,
        statistics: BatchNormStatistics | None,
        *,
        form: str,
    ) -> None:
        self.settings = settings
        self.detector = detector
        self.images: ImageStatistics | None = None
        if settings.per_image != 0 and statistics is not None:
            self.images = ImageStatistics(statistics, form)

    @contextlib.contextmanager
    def watching(self, generator: Generator) -> Iterator[None]:
        """Installs what acts inside the network.

        Args:
            generator: draws what changes from one pass to the next.
        """
        with contextlib.ExitStack() as stack:
            if self.settings.swing:
                stack.enter_context(_swinging(self.detector.module, generator))
            if self.images is not None:
                stack.enter_context(self.images)
            yield

    def view(self, view: Tensor, targets: Targets, generator: Generator) -> tuple[Tensor, Targets]:
        """What the network sees of images `(n, 3, h, w)`, and the labels of that."""
        if self.settings.zoom > 0:
            view, targets = augment(view, targets, generator, flip=0.0, zoom=self.settings.zoom)
        if self.settings.soft_labels > 0:
            targets = smoothed(
                targets, self.detector.num_classes, self.settings.soft_labels, generator
            )
        return view, targets

    def distances(self, distances: Tensor) -> Tensor:
        """BatchNorm distances `(layers,)` as they count, from those of the last forward pass."""
        if self.settings.slack > 0:
            distances = (distances - self.settings.slack).clamp_min(0)
        if self.images is not None:
            share = self.settings.per_image
            distances = (1 - abs(share)) * distances + share * self.images.distances()
        if self.settings.emphasis != 0:
            depth = torch.arange(1, len(distances) + 1, device=distances.device) / len(distances)
            weight = depth**self.settings.emphasis
            distances = distances * (weight / weight.mean())
        return distances

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient `(n, 3, h, w)` that the optimizer gets."""
        if self.settings.low_pass > 0:
            return blurred(gradient, self.settings.low_pass)
        return gradient


def smoothed(targets: Targets, classes: int, share: float, generator: Generator) -> Targets:
    """Labels of which a `share` has a category drawn at random, anew at each call.

    Every family's classification loss is linear in the distribution it is given for an object (a
    sum of binary or categorical cross-entropies), so the mean of its gradient over the draws is
    that of label smoothing (Szegedy et al., 2016) with weight `share`, for all of them alike.
    """
    data = targets.data.clone()
    draw = torch.rand(2, len(data), generator=generator).to(data.device)
    data[:, 1] = torch.where(draw[0] < share, (draw[1] * classes).floor(), data[:, 1])
    return Targets(data)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian low-pass of `(n, c, h, w)`, `sigma` in pixels, mirrored at the borders (SynQ, Kim et
    al. 2025, filters images likewise)."""
    radius = min(max(1, round(3 * sigma)), images.shape[2] - 1, images.shape[3] - 1)
    at = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-at.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    channels = images.shape[1]
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    across = F.conv2d(padded, kernel, groups=channels)
    return F.conv2d(across, kernel.transpose(2, 3), groups=channels)


@contextlib.contextmanager
def _swinging(module: nn.Module, generator: Generator) -> Iterator[None]:
    """Swing convolution (GENIE, Jeon et al. 2023): while gradients are recorded, each strided
    convolution sees its input, mirrored at the borders, moved by less than its stride, so that no
    pixel is always the one that is skipped."""

    def swing(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not torch.is_grad_enabled():
            return None
        assert isinstance(layer, nn.Conv2d)
        x = inputs[0]
        down, across = (s - 1 for s in layer.stride)
        if down >= x.shape[2] or across >= x.shape[3]:
            return None
        offset = torch.rand(2, generator=generator)
        top, left = int(offset[0] * (2 * down + 1)), int(offset[1] * (2 * across + 1))
        padded = F.pad(x, (across, across, down, down), mode="reflect")
        return (padded[:, :, top : top + x.shape[2], left : left + x.shape[3]], *inputs[1:])

    handles: list[Any] = [
        layer.register_forward_pre_hook(swing)
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Ranges of activations that hold on other images than those of the calibration.

Two things go wrong with ranges that are taken from a calibration set alone, and on photographs of
another kind than the network was trained on both cost more than 8 bits do:

- Values that the set does not show are clipped. A channel behind a BatchNorm has a known mean and
  standard deviation, and grids at 7 bits and more have levels to spare for what these imply.
- Objects that were synthesized for the network are more of it than real ones: few places of its
  last layers have values far beyond any that a photograph gives, and steps are coarse for their
  sake. What a Gaussian does not reach is therefore clipped, but not where values grow with the
  contrast of the image: there it is cameras, and not objects, that make the difference. Where the
  set has less contrast than photographs have, those ranges cover the same images with as much.

Below 7 bits a wider grid costs more than clipping does.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..models.base import Model
from .calibration import run_observers, set_range
from .implied import implied_ranges
from .quantizers import Quantizer
from .range_search import LEAST_CONSUMED, grid_above, grid_between
from .traversal import activation_quantizers

BITS = 7
"""Of activations whose ranges are changed, at least."""

LEAST, MOST = 4.0, 6.0
"""Standard deviations of each channel that a grid spans at least, and at most."""

CONTRAST = 2.0
"""Of the images that tell where values grow with it."""

USUAL, HIGHEST = 0.2, 4.0
"""Standard deviation of the pixels of a photograph (0.205 on the mean of 64 of COCO), and the
most that a contrast is raised by to have as much."""

GROWTH, SHARE = 1.02, 0.999
"""Values grow with the contrast where the quantile `SHARE` of their magnitudes grows by more than
this."""

SAMPLES = 1 << 16
"""Values looked at of each activation."""


def with_contrast(images: Tensor, factor: float) -> Tensor:
    """Images `(n, 3, h, w)` in [0, 1] with each pixel `factor` times as far from the image's mean,
    cut off at black and white."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (mean + factor * (images - mean)).clamp_(0, 1)


@torch.no_grad()
def keep_within_statistics(detector: Model, images: Tensor, *, batch_size: int = 8) -> None:
    """Widen and narrow the ranges of activations to what BatchNorm implies.

    Args:
        detector: with quantizers inserted and calibrated; scales and zero points of its quantizers
            of activations of at least `BITS` bits are changed in place.
        images: uint8 `(n, 3, h, w)`, RGB; a few are enough.
        batch_size: images of one forward pass.
    """
    wide = [
        (name, quantizer)
        for name, quantizer in activation_quantizers(detector.module)
        if quantizer.bits >= BITS and quantizer.searched
    ]
    if not wide:
        return
    least, most = implied_ranges(detector, LEAST), implied_ranges(detector, MOST)
    pixels = images.to(detector.device).float() / 255
    plain = run_observers(detector, pixels.split(batch_size), samples=SAMPLES)
    strong = run_observers(
        detector,
        (with_contrast(batch, CONTRAST) for batch in pixels.split(batch_size)),
        samples=SAMPLES,
    )
    factor = usual_contrast(pixels)
    usual = None
    if factor > 1:
        batches = (with_contrast(batch, factor) for batch in pixels.split(batch_size))
        usual = run_observers(detector, batches, samples=SAMPLES)
    for name, quantizer in wide:
        if name not in least:
            continue
        low, high = span(quantizer)
        if _reach(strong[name]) <= GROWTH * _reach(plain[name]):
            low, high = low.clamp_min(most[name][0]), high.clamp_max(most[name][1])
        elif usual is not None:
            set_range(quantizer, torch.cat([plain[name], usual[name]]), "mse")
            wider = span(quantizer)
            low, high = torch.minimum(low, wider[0]), torch.maximum(high, wider[1])
        low, high = low.clamp_max(least[name][0]), high.clamp_min(least[name][1])
        low = low.clamp_min(LEAST_CONSUMED.get(quantizer.consumer or "", float("-inf")))
        spanning = functools.partial(grid_between, low, high, quantizer.bits)
        quantizer.initialise(*grid_above(quantizer, low, spanning))


def usual_contrast(images: Tensor) -> float:
    """By how much the contrast of images `(n, 3, h, w)` in [0, 1] has to be raised for that of
    photographs; 1 where they have it."""
    spread = float(images.std(dim=(1, 2, 3)).mean())
    return min(max(USUAL / max(spread, 1e-6), 1.0), HIGHEST)


def span(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Least and largest value of a quantizer's grid, `(channels,)` each."""
    qmin, qmax = quantizer.bounds
    zero, scale = quantizer.zero_point.detach().round(), quantizer.scale.detach()
    return (qmin - zero) * scale, (qmax - zero) * scale


def _reach(values: Tensor) -> float:
    magnitudes = values.abs()
    return float(magnitudes.kthvalue(max(1, round(SHARE * len(magnitudes)))).values)

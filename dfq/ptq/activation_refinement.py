"""Grids of activations where the predictions stay closest, not the activations.

Least squares over all values of a tensor is a poor guide below 8 bits. A few channels with large
values may hold nearly all of the error and say nothing to the layer that reads them, while the
little a SiLU lets through below zero, which a grid with coarse steps drops whole, is small and
matters. So the grid of one quantizer after another, in the order they run, is moved to where the
*network's predictions* are closest to the float network's while those before it are quantized as
they will be and nothing after it is. It is one number that is looked for, and a few images settle
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..models.base import Model
from ..models.divergence import summed_divergence
from ..quantization.margins import with_contrast
from ..quantization.quantizers import Quantizer
from ..quantization.traversal import activation_quantizers
from .grid_walk import Grid, walking

BITS = range(5, 8)
"""Of activations whose grids are moved. With 8 there is nothing to gain. With 4, grids that suit
the float weights do not suit rounded ones: YOLOv5n at W4A4 ended further from the float network
than with least squares."""

FACTORS = (0.5, 0.6, 0.72, 0.85, 1.0, 1.2, 1.45)
"""Of the present step size: those that are tried."""

HOPELESS = 3.0
"""Grids with so many times the squared error of the best one are not tried on the network."""

ENOUGH = 1.05
"""Least squared error below zero, times this, is had with as few levels there as will do."""

CONTRAST = 1.5
"""Of half of the images. On photographs the inputs of YOLOv5n's second to fourth convolution reach
1.5 to 2 times as far as on synthetic images."""


def half_with_contrast(images: Tensor, factor: float) -> Tensor:
    """Every second image with stronger contrast.

    Images that were made to meet mean and variance of every feature lack the rare large values that
    edges and print give the first layers of a network on photographs.

    Args:
        images: `(n, 3, h, w)` in [0, 1].
        factor: of the distance to the image's mean, before values are cut off at black and white.
    """
    result = images.clone()
    result[1::2] = with_contrast(images[1::2], factor)
    return result


def narrow_activations(student: Model) -> list[tuple[str, Quantizer]]:
    """(name, quantizer) of those activations whose grids are worth refining; see `BITS`."""
    return [
        (name, quantizer)
        for name, quantizer in activation_quantizers(student.module)
        if quantizer.bits in BITS and quantizer.searched
    ]


@torch.no_grad()
def refine_grids(
    student: Model,
    teacher: Model,
    images: Tensor,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Move the grids of activations of 5 to 7 bits to where the predictions stay closest, or leave
    them all where they are if the network is not closer for it.

    Args:
        student: quantizers inserted and calibrated, weights still those of the teacher; the scales
            and zero points of its quantizers of activations are changed in place.
        teacher: the float detector it is a copy of, folded.
        images: uint8 `(n, 3, h, w)`, RGB.
        batch_size: images of one forward pass.
        progress: called with quantizers done and quantizers in all.
    """
    pixels = half_with_contrast(images.to(student.device).float() / 255, CONTRAST)
    narrow = dict(narrow_activations(student))
    if not narrow:
        return
    batches, apart = pixels.split(batch_size), partial(summed_divergence, student)
    with walking(student, teacher, batches, narrow, apart) as walk:
        before = walk.grids()
        walk.enable(True)
        start = walk.distance()
        walk.enable(False)
        walk.move(candidates, stay_on=True, progress=progress)
        # What served each may not serve all of them together.
        if walk.distance() >= start:
            walk.restore(before)


def candidates(
    quantizer: Quantizer,
    values: Tensor,
    *,
    factors: Sequence[float] = FACTORS,
    hopeless: float = HOPELESS,
) -> list[Grid]:
    """(step size, zero point), `(1,)` each, of the grids that are worth trying, the present one
    first.

    Args:
        quantizer: per tensor.
        values: `(n,)` that reach it.
        factors: of the present step size, to try.
        hopeless: see `HOPELESS`.
    """
    qmin, qmax = quantizer.bounds
    present, zero = quantizer.scale.detach(), quantizer.zero_point.detach()
    zeros = zero.round()
    if quantizer.asymmetric:
        zeros = torch.arange(qmin, qmax + 1, device=values.device, dtype=values.dtype)
    errors = {(1.0, int(zero.round())): _errors(values, present, zero, qmin, qmax).sum()}
    for factor in factors:
        scale = present * factor
        # More levels below zero than the least value needs cost some above, and gain nothing.
        needed = max(0, -int((values.amin() / scale).round()))
        below, above = _errors(values, scale, zeros[: needed + 1], qmin, qmax)
        # What a mean over all values takes for the best, and what leaves nothing below zero out.
        total, whole = below + above, below <= ENOUGH * below.amin()
        for index in (int(total.argmin()), int(whole.int().argmax())):
            errors.setdefault((factor, int(zeros[index])), total[index])
    limit = hopeless * torch.stack(list(errors.values())).amin()
    return [
        (present * factor, torch.full_like(zero, level))
        for (factor, level), error in errors.items()
        if error <= limit
    ]


def _errors(values: Tensor, scale: Tensor, zeros: Tensor, qmin: int, qmax: int) -> Tensor:
    """Mean squared errors `(2, zero points)` of values below zero, and of the others."""
    steps = (values / scale).round()
    sides = (values < 0).to(values.dtype)
    errors = []
    for zero in zeros.round():
        square = (steps.clamp(qmin - zero, qmax - zero) * scale - values).square()
        errors.append(torch.stack([(square * sides).mean(), (square * (1 - sides)).mean()]))
    return torch.stack(errors, dim=1)

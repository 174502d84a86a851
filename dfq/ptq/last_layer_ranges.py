"""Ranges of what the last layers read, where the predictions stay closest.

Nothing comes after the last layers that would even out an error: a step that is too coarse moves
every score, and a value that is clipped is an object that loses its own. Which of the two costs
more differs from network to network, and neither the values nor BatchNorm's statistics tell: of two
YOLOv5n, both clipped at six standard deviations, the one that knows 80 classes loses by any less,
and the one that knows faces by anything more than three. The predictions on the calibration images
do tell. With fewer than 8 bits, `activation_refinement` looks at all activations in this way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..models.base import Model
from ..models.divergence import summed_divergence
from ..quantization.quantizers import Quantizer
from ..quantization.range_search import FINE, grid_above, grid_between
from ..quantization.traversal import activation_quantizers, quantized_layers
from .grid_walk import Grid, walking

CLIP_RATIOS = tuple(2.0 ** (-power / 4) for power in range(11))
"""Of the largest magnitude: where grids end that are tried, 1 to 0.18."""

SLACK = 1.25
"""How much further from the float network's predictions a finer grid may be than the best one: the
set shows more and clearer objects than photographs do, and larger values with them."""


def last_layer_inputs(student: Model) -> dict[str, Quantizer]:
    """Quantizers of what the last layers read, of 8 bits, by the names of `activation_quantizers`.

    Args:
        student: with quantizers inserted.
    """
    last = set(student.boundary_layers().last)
    read = {
        layer.input_quantizer for name, layer in quantized_layers(student.module) if name in last
    }
    return {
        name: quantizer
        for name, quantizer in activation_quantizers(student.module)
        if quantizer in read and quantizer.bits == FINE and quantizer.searched
    }


@torch.no_grad()
def search_last_inputs(
    student: Model,
    teacher: Model,
    images: Tensor,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Give the inputs of the last layers, of 8 bits, the grids with which, all else in float, the
    predictions are closest to the float network's.

    Args:
        student: quantizers inserted and calibrated, weights still those of the teacher; scales and
            zero points are changed in place.
        teacher: the float network it is a copy of, folded.
        images: uint8 `(n, 3, h, w)`, RGB.
        batch_size: images of one forward pass.
        progress: called with quantizers done and quantizers in all.
    """
    quantizers = last_layer_inputs(student)
    if not quantizers:
        return
    batches = (images.to(student.device).float() / 255).split(batch_size)
    apart = partial(summed_divergence, student)
    with walking(student, teacher, batches, quantizers, apart) as walk:
        walk.move(clipped_grids, stay_on=False, slack=SLACK, progress=progress)


def clipped_grids(quantizer: Quantizer, values: Tensor) -> list[Grid]:
    """(step size, zero point), `(1,)` each: the present one, and those that end at `CLIP_RATIOS` of
    the largest magnitude among the values.

    Args:
        quantizer: per tensor.
        values: `(n,)` that reach it.
    """
    low, high = values.amin()[None], values.amax()[None]
    largest = torch.maximum(-low, high)
    grids = [(quantizer.scale.detach().clone(), quantizer.zero_point.detach().clone())]
    for ratio in CLIP_RATIOS:
        least, most = low.maximum(-ratio * largest), high.minimum(ratio * largest)
        spanning = partial(grid_between, least, most, quantizer.bits)
        grids.append(grid_above(quantizer, least, spanning))
    return grids

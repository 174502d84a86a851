"""Ranges of what the last layers read, where the predictions stay closest.

Nothing comes after the last layers that would even out an error: a step that is too coarse moves
every score, and a value that is clipped is an object that loses its own. Which of the two costs
more differs from network to network, and neither the values nor BatchNorm's statistics tell: of two
YOLOv5n, both clipped at six standard deviations, the one that knows 80 classes loses by any less,
and the one that knows faces by anything more than three. The predictions on the calibration images
do tell. With fewer than 8 bits, `activation_refinement` looks at all activations in this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..graph.execution import hooks
from ..models.base import Model
from ..models.divergence import summed_divergence
from ..quantization.layers import QuantConv2d, QuantLinear
from ..quantization.quantizers import Quantizer
from ..quantization.range_search import FINE, LEAST_CONSUMED, VANISHING, grid_above, grid_between
from ..quantization.traversal import activation_quantizers, float_mode, quantized_layers
from .grid_walk import Grid, walking

CLIP_RATIOS = tuple(2.0 ** (-power / 4) for power in range(11))
"""Of the largest magnitude: where grids end that are tried, 1 to 0.18."""

SLACK = 1.25
"""How much further from the float network's predictions a finer grid may be than the best one: the
set shows more and clearer objects than photographs do, and larger values with them."""


def last_layer_inputs(student: Model, image: Tensor) -> dict[str, Quantizer]:
    """Quantizers of 8 bits of what the last layers read, and of the values that an activation
    function makes that of, by the names of `activation_quantizers`.

    Args:
        student: with quantizers inserted.
        image: `(1, 3, h, w)` in [0, 1].
    """
    read = _quantizers_before_last(student, image)
    return {
        name: quantizer
        for name, quantizer in activation_quantizers(student.module)
        if quantizer in read and quantizer.bits == FINE and quantizer.searched
    }


@torch.no_grad()
def _quantizers_before_last(student: Model, image: Tensor) -> set[Quantizer]:
    layers = dict(quantized_layers(student.module))
    last = set(student.boundary_layers().last)
    # Whose output a tensor is, as far as modules without weights hand it on. As long as tensors are
    # alive, no two have one id.
    origins: dict[int, tuple[Tensor, QuantConv2d | QuantLinear]] = {}
    before: set[Quantizer] = set()

    def hand_on(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if not isinstance(output, Tensor):
            return
        if isinstance(module, (QuantConv2d, QuantLinear)):
            origins[id(output)] = (output, module)
        elif len(inputs) == 1 and id(inputs[0]) in origins:
            origins[id(output)] = (output, origins[id(inputs[0])][1])

    def read(layer: QuantConv2d | QuantLinear, inputs: tuple[object, ...]) -> None:
        before.add(layer.input_quantizer)
        origin = origins.get(id(inputs[0]))
        if origin is not None and isinstance(origin[1].output_quantizer, Quantizer):
            before.add(origin[1].output_quantizer)

    def watch() -> Iterator[RemovableHandle]:
        for name, module in student.module.named_modules():
            plain = (
                next(module.children(), None) is None and next(module.parameters(), None) is None
            )
            if name in layers or (plain and not isinstance(module, Quantizer)):
                yield module.register_forward_hook(hand_on)
            if name in last and name in layers:
                yield module.register_forward_pre_hook(read)

    with hooks(watch()), float_mode(student.module):
        student.raw(image)
    return before


@torch.no_grad()
def search_last_inputs(
    student: Model,
    teacher: Model,
    images: Tensor,
    *,
    batch_size: int = 8,
) -> None:
    """Give the inputs of the last layers, of 8 bits, and what an activation function makes them of,
    the grids with which, all else in float, the predictions are closest to the float network's.

    Args:
        student: quantizers inserted and calibrated, weights still those of the teacher; scales and
            zero points are changed in place.
        teacher: the float network it is a copy of, folded.
        images: uint8 `(n, 3, h, w)`, RGB.
        batch_size: images of one forward pass.
    """
    batches = (images.to(student.device).float() / 255).split(batch_size)
    quantizers = last_layer_inputs(student, batches[0][:1])
    if not quantizers:
        return
    apart = partial(summed_divergence, student)
    with walking(student, teacher, batches, quantizers, apart) as walk:
        walk.move(clipped_grids, stay_on=False, slack=SLACK)


def clipped_grids(quantizer: Quantizer, values: Tensor) -> list[Grid]:
    """(step size, zero point), `(1,)` each: the present one, and those that end at `CLIP_RATIOS` of
    the largest magnitude among the values.

    Args:
        quantizer: per tensor.
        values: `(n,)` that reach it.
    """
    values = values.clamp_min(LEAST_CONSUMED.get(quantizer.consumer or "", float("-inf")))
    low, high = values.amin()[None], values.amax()[None]
    largest = torch.maximum(-low, high)
    grids = [(quantizer.scale.detach().clone(), quantizer.zero_point.detach().clone())]
    for ratio in CLIP_RATIOS:
        # What an activation function lets through below zero is small, and all of it matters.
        least = low if quantizer.consumer in VANISHING else low.maximum(-ratio * largest)
        most = high.minimum(ratio * largest)
        spanning = partial(grid_between, least, most, quantizer.bits)
        grids.append(grid_above(quantizer, least, spanning))
    return grids

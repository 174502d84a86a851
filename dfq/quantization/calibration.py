"""Initial scales of quantizers, from what reaches them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import UserError
from ..graph.execution import hooks
from ..models.base import Model
from .factors import bound_factors
from .layers import QuantConv2d, QuantLinear
from .peak import PeakQuantizer
from .piecewise import PiecewiseQuantizer
from .quantizers import Quantizer, grid
from .range_search import (
    CONSUMERS,
    FINE,
    LEAST_CONSUMED,
    PREDICTION,
    SEARCHES,
    VANISHING,
    Range,
    cosine,
    grid_above,
    lsq,
    lsq_step,
    minmax,
    mse,
    three_deviations,
)
from .traversal import activation_quantizers, float_mode, quantized_layers


class Observer:
    """Values that reached one quantizer: exact extremes, and an even sample of the rest."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.chunks: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Record values of any shape: both extremes, and fewer than twice `limit` of the others."""
        flat = x.detach().reshape(-1).float()
        low, high = flat.aminmax()
        # A stride coprime to powers of two does not fall in step with channels or rows.
        stride = max(1, flat.numel() // self.limit) | 1
        self.chunks.append(torch.cat([flat[::stride], low[None], high[None]]))

    def values(self, limit: int) -> Tensor:
        """Fewer than twice `limit` of the recorded values, and the extremes: float32 `(n,)`."""
        everything = torch.cat(self.chunks)
        low, high = everything.aminmax()
        stride = max(1, everything.numel() // limit)
        return torch.cat([everything[::stride], low[None], high[None]])


@torch.no_grad()
def run_observers(
    detector: Model,
    batches: Iterable[Tensor],
    *,
    samples: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Samples of the input of each quantizer of activations, with fake quantization disabled.

    Args:
        detector: with quantizers inserted.
        batches: images `(n, 3, h, w)` in [0, 1].
        samples: values kept of each, extremes among them.
        progress: called with the number of images after each batch.

    Returns:
        Name, as `activation_quantizers` gives it -> values `(n,)`.

    Raises:
        UserError: if there is no image at all.
    """
    activations = list(activation_quantizers(detector.module))
    observers: dict[str, Observer] = {name: Observer(samples) for name, _ in activations}
    watched = hooks(
        quantizer.register_forward_pre_hook(
            lambda _m, inputs, name=name: observers[name].add(inputs[0])
        )
        for name, quantizer in activations
    )
    images = 0
    with watched, float_mode(detector.module):
        for batch in batches:
            detector.raw(batch.to(detector.device))
            images += len(batch)
            if progress is not None:
                progress(images)
    if images == 0:
        raise UserError("calibration: the set has no images")
    return {name: sampled.values(samples) for name, sampled in observers.items()}


@torch.no_grad()
def set_weight_range(layer: QuantConv2d | QuantLinear, search: str) -> None:
    """Set the initial scales of a layer's weights; `search` is a key of `range_search.SEARCHES`."""
    weights, find = layer.weight_quantizer, SEARCHES[search]
    if isinstance(weights, PiecewiseQuantizer):
        # By a search of its own.
        weights.search(layer.weight.detach().float().reshape(weights.channels, -1))
        return
    if find is lsq and layer.input_quantizer.asymmetric:
        # Zero points of activations make it LSQ+.
        find = three_deviations
    if find in (mse, cosine) and weights.asymmetric:
        # Bounds that are searched apart from each other: coarsely, as there are six times as many.
        find = functools.partial(find, steps=16)
    rows = layer.weight.detach().float().reshape(weights.channels, -1)
    low, high = weights.bounds
    if low == -high and find is not three_deviations:
        # So that the least value is met by the integer that the greatest one is met by.
        rows = rows.abs()
    weights.initialise(*find(rows, weights.bits, asymmetric=weights.asymmetric))


def set_range(quantizer: Quantizer, values: Tensor, search: str) -> None:
    """Set the initial scale of a quantizer of activations from values `(n,)` that reach it."""
    if isinstance(quantizer, PeakQuantizer):
        # By a rule of its own.
        quantizer.fit(values)
        return
    column = values[None].to(quantizer.log_scale.device)
    # With more than 8 bits there are levels for all values, and clipping any costs the most.
    find, consumer = SEARCHES[search if quantizer.bits <= 8 else "minmax"], quantizer.consumer
    if consumer == "relu":
        # Clipping below zero does what the ReLU does: no level is to be spent there.
        column = column.clamp_min(LEAST_CONSUMED[consumer])
    elif find is mse and consumer == PREDICTION:
        find = minmax
    elif find is mse and consumer in VANISHING and quantizer.bits >= FINE:
        # What is clipped below errs to one side, which the next layer adds up and mse does not see.
        column, find = column.clamp_min(LEAST_CONSUMED[consumer]), minmax
    elif find is mse and consumer in CONSUMERS:
        find = functools.partial(mse, through=CONSUMERS[consumer])

    def fit(asymmetric: bool) -> Range:
        if find is lsq and not quantizer.asymmetric:
            return lsq_step(column, grid(quantizer.bits, signed=not asymmetric)[1])
        return find(column, quantizer.bits, asymmetric=asymmetric)

    quantizer.initialise(*grid_above(quantizer, column.amin(), fit))


@torch.no_grad()
def calibrate(
    detector: Model,
    batches: Iterable[Tensor],
    *,
    search: str = "mse",
    samples: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Set every quantizer's initial scale: of weights from themselves, all others from images.

    Args:
        detector: with quantizers inserted; fake quantization is disabled while this runs.
        batches: images `(n, 3, h, w)` in [0, 1].
        search: a key of `range_search.SEARCHES`; min-max sees every value, the others a sample.
        samples: values of an activation the search works on.
        progress: called with the number of images after each batch.

    Raises:
        UserError: if there is no image at all.
    """
    static = {
        name: quantizer
        for name, quantizer in activation_quantizers(detector.module)
        if quantizer.searched or isinstance(quantizer, PeakQuantizer)
    }
    values = {}
    if static:
        values = run_observers(detector, batches, samples=samples, progress=progress)
    for _, layer in quantized_layers(detector.module):
        set_weight_range(layer, search)
    for name, quantizer in static.items():
        set_range(quantizer, values[name], search)
    bound_factors(detector.module)

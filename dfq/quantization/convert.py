"""Put quantizers into a detector by policy, and set their initial scales."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..graph.fold_batchnorm import fold_batchnorm
from ..graph.tracing import trace
from ..models.base import Detector
from .bit_widths import Widths, parse_widths
from .factors import bound_factors
from .inspection import FLOAT_KINDS, describe
from .layers import QUANTIZED_LAYERS, QuantConv2d, QuantLinear, QuantMatmul, QuantSiLU
from .output_quantizers import quantize_results, result_quantizers
from .placement import EVERYWHERE, INPUTS, PLACEMENTS, Placement
from .quantizers import Quantizer, grid
from .range_search import (
    FINE,
    LEAST_READ,
    PREDICTION,
    READERS,
    SEARCHES,
    VANISHING,
    Range,
    lsq,
    lsq_step,
    minmax,
    mse,
    three_deviations,
)


@dataclass(frozen=True)
class Policy:
    """Which layers get which bits.

    Attributes:
        weight_bits, activation_bits: 2 to 8, of activations up to 16.
        first_last_bits: of the layers that see the image and those that give the predictions:
            8, "float", or "same" as the others.
        weights: "per_channel" or "per_tensor".
        weight_grid: "asymmetric": below 8 bits each scale's grid has a zero point, so that its
            levels need not reach as far below zero as above; "symmetric". Either way values are
            integers of at most 8 bits times a step size, as runtimes multiply with.
        activations: "asymmetric" (LSQ+) or "symmetric" (LSQ; see `unsigned`).
        overrides: qualified layer name or wildcard -> "float", a bit width for both, or "w4a8";
            the first match counts and wins over everything else.
        scope: "all", or "backbone": layers outside it stay in float.
        placement: "inputs": weights and inputs of layers are quantized; "everywhere": also their
            outputs and what is added or concatenated (see `results`); "qdq": as `runtime` needs it
            to compute in integers (see `placement`).
        runtime: a key of `placement.PLACEMENTS`; counts with "qdq" alone.
    """

    weight_bits: int = 4
    activation_bits: int = 8
    first_last_bits: int | str = 8
    weights: str = "per_channel"
    activations: str = "asymmetric"
    overrides: tuple[tuple[str, int | str], ...] = ()
    scope: str = "all"
    placement: str = "inputs"
    weight_grid: str = "asymmetric"
    runtime: str = "onnxruntime"

    @property
    def where(self) -> Placement:
        """Where quantizers stand."""
        if self.placement == "qdq":
            return PLACEMENTS[self.runtime]
        return EVERYWHERE if self.placement == "everywhere" else INPUTS

    @property
    def asymmetric(self) -> bool:
        """Whether grids of activations have zero points."""
        return self.activations == "asymmetric" and not self.where.symmetric

    @property
    def unsigned(self) -> bool:
        """Whether symmetric grids of what is never below zero have all their levels above it: not
        where a runtime takes int8, in which such a grid has a zero point."""
        return self.activations == "symmetric" and not (self.where.symmetric or self.where.signed)

    def quantizer(self, bits: int) -> Quantizer:
        """One of activations."""
        return Quantizer(bits, asymmetric=self.asymmetric, unsigned=self.unsigned)

    def bits_for(
        self, name: str, boundary: bool, backbone: str | None = None
    ) -> tuple[int, int] | None:
        """(weight bits, activation bits) of a layer, or None where it stays in float.

        Args:
            name: of the layer.
            boundary: whether it sees the image or gives predictions.
            backbone: name of the backbone; looked at for that scope only.
        """
        for pattern, bits in self.overrides:
            if fnmatch.fnmatchcase(name, pattern):
                return parse_widths(bits)
        if self.scope == "backbone" and not name.startswith(f"{backbone}."):
            return None
        if boundary and self.first_last_bits != "same":
            if self.first_last_bits == "float":
                return None
            return int(self.first_last_bits), int(self.first_last_bits)
        return self.weight_bits, self.activation_bits

    def shifts_weights(self, bits: int) -> bool:
        """Whether grids of weights of so many bits have zero points."""
        # At 8 bits the grid is the runtimes' own, and has levels enough on either side.
        return self.weight_grid == "asymmetric" and bits < 8

    def is_fixed(self, name: str, boundary: bool) -> bool:
        """Whether a layer's bits are given by more than `weight_bits` and `activation_bits`."""
        named = any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in self.overrides)
        return named or (boundary and self.first_last_bits != "same")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "overrides": [list(pair) for pair in self.overrides]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Policy:
        overrides = tuple((str(name), bits) for name, bits in data.get("overrides", ()))
        # What was saved before there was a choice had no zero points of weights.
        return cls(**{"weight_grid": "symmetric", **data, "overrides": overrides})


def fold(detector: Detector) -> Detector:
    """Fold the BatchNorm layers of `detector` in place; returns it."""
    side = detector.stride * 2
    image = torch.zeros(1, 3, side, side, device=detector.device)
    fold_batchnorm(detector.module, lambda: detector.raw(image))
    return detector


def _replace(module: nn.Module, layer: nn.Module, wrapped: nn.Module) -> None:
    """Put `wrapped` wherever `layer` is: heads that share a layer hold it under several names."""
    for parent in list(module.modules()):
        # Not named_children(): it passes over the second name.
        for leaf, child in list(parent._modules.items()):
            if child is layer:
                setattr(parent, leaf, wrapped)


def insert_quantizers(detector: Detector, policy: Policy) -> Detector:
    """Replace the layers of `detector` in place as `policy` says; scales are not set yet.

    Raises:
        UserError: where an override matches no layer, or the scope is a backbone that the network
            does not have.
    """
    if policy.scope == "backbone" and detector.backbone is None:
        raise UserError(
            "quantization.scope: this network has no backbone apart from neck and heads; use all, "
            "and overrides for the layers to leave in float"
        )
    boundary = detector.boundary_layers()
    edge = {*boundary.first, *boundary.last}
    layers = describe(detector, detector.stride * 2)
    for pattern, _ in policy.overrides:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in layers):
            raise UserError(
                f"quantization.overrides: no layer is called '{pattern}' "
                f"(for example '{layers[0].name}'; dfq inspect lists them all)"
            )
    chosen: dict[str, Widths] = {}
    for row in layers:
        bits = policy.bits_for(row.name, row.name in edge, detector.backbone)
        if bits is not None and row.kind not in FLOAT_KINDS:
            chosen[row.name] = bits
    found = trace(detector, chosen) if policy.where.joins else None
    for row in layers:
        if row.name not in chosen:
            continue
        bits = chosen[row.name]
        layer = detector.module.get_submodule(row.name)
        if row.kind == "matmul":
            product = QuantMatmul(policy.quantizer(bits[1]), policy.quantizer(bits[1]))
            _replace(detector.module, layer, product.train(layer.training).to(detector.device))
            continue
        channels = row.weight_shape[0] if policy.weights == "per_channel" else 1
        shifted = policy.shifts_weights(bits[0])
        narrow = policy.where.narrow_weights
        weights = Quantizer(bits[0], channels=channels, asymmetric=shifted, narrow=narrow)
        inputs = policy.quantizer(bits[1])
        wrapped: nn.Module
        if isinstance(layer, nn.Conv2d):
            wrapped = QuantConv2d.wrap(layer, inputs, weights)
        else:
            assert isinstance(layer, nn.Linear)
            wrapped = QuantLinear.wrap(layer, inputs, weights)
        wrapped.train(layer.training).to(detector.device)
        _replace(detector.module, layer, wrapped)
    if found is not None:
        quantize_results(detector, found, policy.where, policy.quantizer)
    return detector


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear]]:
    """(name, layer) of every quantized layer."""
    for name, layer in module.named_modules():
        if isinstance(layer, QUANTIZED_LAYERS):
            yield name, layer


def product_quantizers(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer) of both operands of every quantized product of activations."""
    for name, layer in module.named_modules():
        if isinstance(layer, QuantMatmul):
            yield f"{name}.left_quantizer", layer.left_quantizer
            yield f"{name}.right_quantizer", layer.right_quantizer


def activation_quantizers(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer) of every activation that is quantized: a layer's input under the name of
    the layer, all others under their own. One that is in several places has the first's name."""
    inputs = [(name, layer.input_quantizer) for name, layer in quantized_layers(module)]
    seen: set[Quantizer] = set()
    for name, quantizer in (*inputs, *product_quantizers(module), *result_quantizers(module)):
        if quantizer not in seen:
            seen.add(quantizer)
            yield name, quantizer


@contextmanager
def float_mode(module: nn.Module) -> Iterator[None]:
    """Within this context the quantizers let everything through."""
    quantizers = [m for m in module.modules() if isinstance(m, (Quantizer, QuantSiLU))]
    before = [q.enabled for q in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in zip(quantizers, before, strict=True):
            quantizer.enabled = enabled


class _Samples:
    """Values that reached one quantizer: exact extremes, and an even sample of the rest."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.chunks: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1).float()
        low, high = flat.aminmax()
        # A stride coprime to powers of two does not fall in step with channels or rows.
        stride = max(1, flat.numel() // self.limit) | 1
        self.chunks.append(torch.cat([flat[::stride], low[None], high[None]]))

    def values(self, limit: int) -> Tensor:
        everything = torch.cat(self.chunks)
        low, high = everything.aminmax()
        stride = max(1, everything.numel() // limit)
        return torch.cat([everything[::stride], low[None], high[None]])


@torch.no_grad()
def observe(
    detector: Detector,
    batches: Iterable[Tensor],
    *,
    samples: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """What reaches each quantizer of activations while all of them let everything through.

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
    taken: dict[str, _Samples] = {name: _Samples(samples) for name, _ in activations}
    handles = [
        quantizer.register_forward_pre_hook(
            lambda _m, inputs, name=name: taken[name].add(inputs[0])
        )
        for name, quantizer in activations
    ]
    images = 0
    try:
        with float_mode(detector.module):
            for batch in batches:
                detector.raw(batch.to(detector.device))
                images += len(batch)
                if progress is not None:
                    progress(images)
    finally:
        for handle in handles:
            handle.remove()
    if images == 0:
        raise UserError("calibration: the set has no images")
    return {name: sampled.values(samples) for name, sampled in taken.items()}


@torch.no_grad()
def set_weight_range(layer: QuantConv2d | QuantLinear, search: str) -> None:
    """Set the initial scales of a layer's weights; `search` is a key of `ranges.SEARCHES`."""
    weights, find = layer.weight_quantizer, SEARCHES[search]
    if find is lsq and layer.input_quantizer.asymmetric:
        # Zero points of activations make it LSQ+.
        find = three_deviations
    if find is mse and weights.asymmetric:
        # Bounds that are searched apart from each other: coarsely, as there are six times as many.
        find = functools.partial(mse, steps=16)
    rows = layer.weight.detach().float().reshape(weights.channels, -1)
    low, high = weights.bounds
    if low == -high and find is not three_deviations:
        # So that the least value is met by the integer that the greatest one is met by.
        rows = rows.abs()
    weights.initialise(*find(rows, weights.bits, asymmetric=weights.asymmetric))


def grid_above(quantizer: Quantizer, low: Tensor, find: Callable[[bool], Range]) -> Range:
    """The grid that a search finds for a quantizer of activations.

    Args:
        quantizer: per tensor.
        low: the least value that it is to have a level for.
        find: gives step size and zero point for a grid that is asymmetric or not; the former has
            its zero point at 0 where nothing is below zero.
    """
    if quantizer.asymmetric or not quantizer.unsigned or bool(low < 0):
        return find(quantizer.asymmetric)
    scale, _ = find(True)
    return scale, torch.full_like(scale, quantizer.bounds[0])


def set_range(quantizer: Quantizer, values: Tensor, search: str) -> None:
    """Set the initial scale of a quantizer of activations from values `(n,)` that reach it."""
    column = values[None].to(quantizer.log_scale.device)
    # With more than 8 bits there are levels for all values, and clipping any costs the most.
    find, reader = SEARCHES[search if quantizer.bits <= 8 else "minmax"], quantizer.reader
    if reader == "relu":
        # Clipping below zero does what the ReLU does: no level is to be spent there.
        column = column.clamp_min(LEAST_READ[reader])
    elif find is mse and reader == PREDICTION:
        find = minmax
    elif find is mse and reader in VANISHING and quantizer.bits >= FINE:
        # What is clipped below errs to one side, which the next layer adds up and mse does not see.
        column, find = column.clamp_min(LEAST_READ[reader]), minmax
    elif find is mse and reader in READERS:
        find = functools.partial(mse, through=READERS[reader])

    def fit(asymmetric: bool) -> Range:
        if find is lsq and not quantizer.asymmetric:
            return lsq_step(column, grid(quantizer.bits, signed=not asymmetric)[1])
        return find(column, quantizer.bits, asymmetric=asymmetric)

    quantizer.initialise(*grid_above(quantizer, column.amin(), fit))


@torch.no_grad()
def calibrate(
    detector: Detector,
    batches: Iterable[Tensor],
    *,
    search: str = "mse",
    samples: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Set every quantizer's initial scale: of weights from themselves, all others from images.

    Args:
        detector: with quantizers inserted; they let everything through while this runs.
        batches: images `(n, 3, h, w)` in [0, 1].
        search: a key of `ranges.SEARCHES`; min-max sees every value, the others a sample.
        samples: values of an activation the search works on.
        progress: called with the number of images after each batch.

    Raises:
        UserError: if there is no image at all.
    """
    values = observe(detector, batches, samples=samples, progress=progress)
    for _, layer in quantized_layers(detector.module):
        set_weight_range(layer, search)
    for name, quantizer in activation_quantizers(detector.module):
        set_range(quantizer, values[name], search)
    bound_factors(detector.module)

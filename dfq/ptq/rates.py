"""What calibration and rounding do many times, timed on a few images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..graph.execution import hooks
from ..models.base import Model
from ..models.divergence import summed_divergence
from ..quantization.calibration import calibrate, run_observers, set_range, set_weight_range
from ..quantization.layers import QuantConv2d, QuantLinear
from ..quantization.quantizers import Quantizer
from ..quantization.settings import Quantization
from ..quantization.traversal import activation_quantizers, quantized_layers
from .gptq import CLIP_RATIOS, SIDES, gptq_round, is_too_wide, without_fine_activations
from .input_moments import MomentSums, execution_order, place_count
from .last_layer_ranges import last_layer_inputs

COLUMNS, ROWS, SIDE = 64, 2048, 512
"""Of the matrix whose rounding is timed, and of the two whose product is."""

GATHERED = 1000
"""Outputs whose inputs are gathered when that is timed, in the layer where that is most."""

SAMPLED = 1 << 14
"""Values whose range is searched when that is timed, as many as calibration looks at."""


class Stopwatch:
    """Times calls, with all that they start on a device.

    Args:
        device: of the network.
        clock: tells seconds; None: the time of day.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None) -> None:
        self.device, self._clock = device, clock or time.perf_counter

    def now(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()

    def __call__(self, function: Callable[[], object]) -> float:
        """Seconds that a call takes."""
        start = self.now()
        function()
        return self.now() - start


@dataclass(frozen=True)
class LayerWork:
    """A quantized layer, as far as its rounding is concerned.

    Attributes:
        name: its qualified name.
        groups, outputs, inputs: of its weights, `(groups, outputs, inputs)`.
        grids: that are tried for them.
        places: output samples of an image.
        reached: seconds of an image until a pass of the float network gets to it.
        wide: whether its weights are left as they are.
    """

    name: str
    groups: int
    outputs: int
    inputs: int
    grids: int
    places: int
    reached: float
    wide: bool = False

    @property
    def numbers(self) -> int:
        """What one output sample of all groups reads."""
        return self.groups * self.inputs


@dataclass(frozen=True)
class Rates:
    """What takes how many seconds.

    Attributes:
        layers: those that are quantized, in the order they run.
        activations: names of the quantizers whose ranges are searched, and bits.
        last: quantizers of what the last layers read.
        tail: what of a pass comes after the first of those layers begins, an image.
        forward, student: a pass of the float and of the quantized network, an image.
        rounding: the latter's while GPTQ looks at it, in passes of the float one.
        observed: a pass in which what reaches the quantizers is looked at, an image.
        divergence: of the predictions, an image.
        activation: to search the range of an activation.
        weight: to search that of weights, a weight.
        gather: to add what one output reads to the moments, an input.
        column: to round a column of weights, beside `element` for each of them.
        product: a multiplication and addition in a product of matrices.
    """

    layers: Sequence[LayerWork]
    activations: dict[str, int]
    last: int
    tail: float
    forward: float
    student: float
    rounding: float
    observed: float
    divergence: float
    activation: float
    weight: float
    gather: float
    column: float
    element: float
    product: float


@torch.no_grad()
def measure_rates(
    student: Model, teacher: Model, images: Tensor, section: Quantization, watch: Stopwatch
) -> Rates:
    """Time them.

    Args:
        student: with quantizers inserted; calibrated on the images, in place.
        teacher: the float network it is a copy of, folded.
        images: uint8 `(n, 3, h, w)`, a few; what is in them does not count.
        section: of the recipe.
        watch: what to time with.
    """
    count, batch = len(images), images.to(student.device).float() / 255
    calibrate(student, [batch], search="minmax")
    layers = dict(quantized_layers(student.module))
    order = list(execution_order(student.module, lambda: student.raw(batch[:1])))
    # The first pass of all readies what later ones find ready.
    teacher.raw(batch)
    reached, inputs, forward = _pass(teacher, order, batch, watch)
    with without_fine_activations(student.module):
        student.raw(batch)
        rounding = watch(lambda: student.raw(batch)) / max(forward, 1e-9)
    raw, values = teacher.raw(batch), run_observers(student, [batch])
    searched = {name: q for name, q in activation_quantizers(student.module) if q.searched}
    layer_works = [
        _layer_work(name, layers[name], inputs[name], reached[name], count) for name in order
    ]
    column, element, product = _algebra(watch)
    ends = [reached[name] for name in teacher.boundary_layers().last if name in reached]
    return Rates(
        layers=layer_works,
        activations={name: quantizer.bits for name, quantizer in searched.items()},
        last=len(last_layer_inputs(student, batch[:1])),
        tail=(forward - min(ends, default=0.0)) / count,
        forward=forward / count,
        student=watch(lambda: student.raw(batch)) / count,
        rounding=rounding,
        observed=watch(lambda: run_observers(student, [batch])) / count,
        divergence=watch(lambda: summed_divergence(student, raw, raw)) / count,
        activation=_range_search(searched, values, section, watch),
        weight=_weight_search(list(layers.values()), section, watch),
        gather=_gathering(layer_works, layers, inputs, watch),
        column=column,
        element=element,
        product=product,
    )


def _pass(
    model: Model, names: Sequence[str], batch: Tensor, watch: Stopwatch
) -> tuple[dict[str, float], dict[str, Tensor], float]:
    """Seconds until a forward pass gets to each layer for the first time, its input there, and the
    seconds of the whole pass."""
    reached: dict[str, float] = {}
    inputs: dict[str, Tensor] = {}
    start = watch.now()

    def before(name: str, layer_input: Tensor) -> None:
        if name not in reached:
            reached[name], inputs[name] = watch.now() - start, layer_input

    with hooks(
        model.module.get_submodule(name).register_forward_pre_hook(
            lambda _m, layer_inputs, name=name: before(name, layer_inputs[0])
        )
        for name in names
    ):
        model.raw(batch)
    return reached, inputs, watch.now() - start


def _layer_work(
    name: str, layer: QuantConv2d | QuantLinear, layer_input: Tensor, reached: float, count: int
) -> LayerWork:
    groups = layer.groups if isinstance(layer, QuantConv2d) else 1
    sides = len(SIDES) if layer.weight_quantizer.asymmetric else 1
    return LayerWork(
        name,
        groups=groups,
        outputs=layer.weight.shape[0] // groups,
        inputs=layer.weight[0].numel(),
        grids=1 + len(CLIP_RATIOS) * sides,
        places=place_count(layer, layer_input) // count,
        reached=reached / count,
        wide=is_too_wide(layer),
    )


def _range_search(
    quantizers: dict[str, Quantizer],
    values: dict[str, Tensor],
    section: Quantization,
    watch: Stopwatch,
) -> float:
    if not quantizers:
        return 0.0
    name = list(quantizers)[len(quantizers) // 2]
    # As many as there are of more images.
    many = values[name].repeat(-(-SAMPLED // len(values[name])))[:SAMPLED]
    return watch(lambda: set_range(quantizers[name], many, section.local_search))


def _weight_search(
    layers: list[QuantConv2d | QuantLinear], section: Quantization, watch: Stopwatch
) -> float:
    if not layers:
        return 0.0
    # Larger than most, so that what a call takes by itself does not count.
    layer = sorted(layers, key=lambda layer: layer.weight.numel())[3 * len(layers) // 4]
    return watch(lambda: set_weight_range(layer, section.local_search)) / layer.weight.numel()


def _gathering(
    layer_works: Sequence[LayerWork],
    layers: dict[str, QuantConv2d | QuantLinear],
    inputs: dict[str, Tensor],
    watch: Stopwatch,
) -> float:
    narrow = [work for work in layer_works if not work.wide]
    if not narrow:
        return 0.0
    count = len(inputs[layer_works[0].name])
    most = max(narrow, key=lambda work: min(GATHERED, work.places * count) * work.numbers)
    sums = MomentSums(layers[most.name], 2 * GATHERED, 2, Generator().manual_seed(0))
    layer_input = inputs[most.name]
    sums.add(layer_input, layer_input)
    seconds, once = watch(lambda: sums.add(layer_input, layer_input)), sums.count / 2
    return seconds / max(1.0, once * most.numbers)


def _algebra(watch: Stopwatch) -> tuple[float, float, float]:
    """`column`, `element` and `product` of `Rates`."""
    device = watch.device

    def rounding(rows: int) -> float:
        weights = torch.full((1, rows, COLUMNS), 0.3, device=device)
        scale = torch.ones(1, rows, device=device)
        hessian = torch.eye(COLUMNS, device=device)[None]
        return watch(lambda: gptq_round(weights, hessian, scale, -8, 7, damping=0.1))

    rounding(1)
    few, many = rounding(1), rounding(ROWS)
    square = torch.ones(SIDE, SIDE, device=device)
    square @ square
    product = watch(lambda: square @ square)
    element = max(0.0, many - few) / (COLUMNS * (ROWS - 1))
    return few / COLUMNS, element, product / SIDE**3

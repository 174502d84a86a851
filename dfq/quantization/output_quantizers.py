"""Quantizers on what layers, sums and concatenations give, as integer runtimes need them.

onnxruntime computes a convolution in integers only where its output is quantized before any other
function, and a sum or a concatenation only where all operands and the result are quantized. This
module inserts one quantizer a tensor:

- on the output of each quantized layer, but for those whose outputs are the predictions; where
  those have one too, a layer that gives several kinds of prediction has one for each kind;
- on the result of each sum and concatenation of what such layers compute, and of each average,
  which is on the grid of what it averages;
- on all other operands of these (results of activation functions, mostly).

A layer that is given a tensor which is on a grid already has that grid for its input, where it is
as wide as the layer's own is to be: its input quantizer *is* the one of the tensor.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..graph.tracing import AVERAGES, CONCATENATIONS, SUMS, Key, Trace, Value, name_of, trace
from ..models.base import Kinds, Model
from .layers import QUANTIZED_LAYERS, QuantConv2d, QuantLinear, QuantSiLU, SplitOutput
from .placement import Placement
from .quantizers import Quantizer
from .range_search import PREDICTION

RESULT_BITS, WIDE_BITS = 8, 16
"""Of results, and of those that a layer gives or is given that computes with more than 8 bits.
Narrower results gain nothing: runtimes add and concatenate in 8 bits, and a convolution's output
takes no room, being consumed as it is written."""

RESULTS = "result_quantizers"
"""Name, in the network, of the module that holds the quantizers of functions' results."""


class _Watching(TorchFunctionMode):
    """Quantizes results within one forward pass of a module.

    Args:
        quantizers: by function, and number of its call.
    """

    _running: ClassVar[threading.local] = threading.local()

    def __init__(self, quantizers: dict[tuple[str, int], Quantizer]) -> None:
        super().__init__()
        self.quantizers = quantizers
        self.functions = {function for function, _ in quantizers}
        self.calls: Counter[str] = Counter()

    @classmethod
    def _stack(cls) -> list[_Watching]:
        if not hasattr(cls._running, "stack"):
            cls._running.stack = []
        return cls._running.stack

    def __enter__(self) -> _Watching:
        self._stack().append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._stack().pop()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = name_of(func)
        # What an inner module calls passes through here as well.
        if name not in self.functions or self._stack()[-1] is not self:
            return func(*args, **(kwargs or {}))
        quantizer = self.quantizers.get((name, self.calls[name]))
        self.calls[name] += 1
        if quantizer is None:
            return func(*args, **(kwargs or {}))
        if func.__name__ == "add_":
            # What it would write into may be a quantizer's output, which its gradient needs.
            func = torch.add
        return quantizer(func(*args, **(kwargs or {})))


class _Holder(nn.ModuleDict):
    """Holds the quantizers of functions' results; the identity in a network that runs all of its
    modules, as nn.Sequential does."""

    def forward(self, x: Any) -> Any:
        return x


class _Watched:
    """Mixed into the class of a module whose results are quantized: so that its own forward pass
    may still be replaced on the module, as `BlockOutputCache` does."""

    _quantized_results: dict[tuple[str, int], Quantizer]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Watching(self._quantized_results):
            # What it is mixed into has one.
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _watched(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Watched{kind.__name__}", (_Watched, kind), {"__module__": kind.__module__})


def _watch(owner: nn.Module) -> dict[tuple[str, int], Quantizer]:
    if not isinstance(owner, _Watched):
        owner.__class__ = _watched(type(owner))
        # In a dictionary, for modules that run whatever modules they have, as nn.Sequential does.
        owner._quantized_results = {}
    return owner._quantized_results


def insert_output_quantizers(
    detector: Model, traced: Trace, where: Placement, make: Callable[[int], Quantizer]
) -> None:
    """Put quantizers on the outputs of layers and on the operands and results of sums and
    concatenations, in place; scales are not set yet.

    Args:
        detector: its layers quantized.
        traced: what `trace` saw before they were.
        where: which of these.
        make: a quantizer of so many bits.
    """
    wide = _wide_values(detector.module, traced)

    def quantizer_of(value: Value) -> Quantizer:
        made = make(WIDE_BITS if value in wide else RESULT_BITS)
        made.consumer = value.consumer
        return made.train(detector.module.training).to(detector.device)

    last = detector.boundary_layers().last
    kinds = detector.prediction_kinds() if where.predictions else {}
    adds_and_concats = _joined(traced, where)
    joined = {value for result in adds_and_concats for value in (*adds_and_concats[result], result)}
    grids: dict[Value, Quantizer] = {}
    for value in traced.values:
        if value.layer is None or (value.layer in last and not where.predictions):
            continue
        if not where.outputs and value not in joined:
            continue
        consumer = PREDICTION if value.layer in last else value.consumer
        layer = detector.module.get_submodule(value.layer)
        several = kinds.get(value.layer) if value not in joined else None
        if several is not None and isinstance(layer, QUANTIZED_LAYERS):
            # On no grid as a whole: nothing is shared with it.
            layer.output_quantizer = _split(layer, several, functools.partial(quantizer_of, value))
        elif isinstance(layer, QUANTIZED_LAYERS):
            if layer.output_quantizer is None:
                layer.output_quantizer = quantizer_of(value)
                layer.output_quantizer.consumer = consumer
            # All calls of a layer that is shared have to agree.
            if layer.output_quantizer.consumer != consumer:
                layer.output_quantizer.consumer = None
            grids[value] = layer.output_quantizer
    _quantize_functions(detector, traced, grids, adds_and_concats, quantizer_of)
    if where.one_grid:
        _unite(detector.module, adds_and_concats, grids)
    if where.sigmoid_step is not None:
        _quantize_sigmoids(traced, grids, where.sigmoid_step)
    _share_inputs(detector.module, traced, grids)
    # An activation function that writes into a quantizer's output destroys what its gradient needs.
    for module in detector.module.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False


def _split(
    layer: QuantConv2d | QuantLinear, kinds: Kinds, make: Callable[[], Quantizer]
) -> SplitOutput:
    quantizers = [make() for _ in kinds.sizes]
    for quantizer in quantizers:
        quantizer.consumer = PREDICTION
    return SplitOutput(quantizers, kinds, 1 if isinstance(layer, QuantConv2d) else -1)


def _wide_values(module: nn.Module, traced: Trace) -> set[Value]:
    """Values that layers of more than 8 bits give or are given, and what functions make of them."""

    def is_wide(name: str) -> bool:
        layer = module.get_submodule(name)
        return isinstance(layer, QUANTIZED_LAYERS) and layer.input_quantizer.bits > RESULT_BITS

    read = {value for name, values in traced.inputs.items() if is_wide(name) for value in values}
    wide: set[Value] = set()
    for value in traced.values:
        if value.layer is not None:
            from_wide = is_wide(value.layer)
        else:
            from_wide = any(source in wide for source in value.sources)
        if from_wide or value in read:
            wide.add(value)
    return wide


def _joined(traced: Trace, where: Placement) -> dict[Value, list[Value]]:
    """Sums, concatenations and averages that are quantized, and which of their operands are."""
    number = {value: place for place, value in enumerate(traced.values)}
    adds_and_concats = {}
    for result in traced.adds_and_concats():
        if result.function in AVERAGES and not where.averages:
            continue
        operands = list(result.operands)
        if where.fused_sums and result.function in SUMS:
            operands = sorted(operands, key=number.__getitem__)[:-1]
        # What is computed outside of every module cannot be reached.
        if all(value.layer is not None or traced.owner_of(value) for value in (*operands, result)):
            adds_and_concats[result] = operands
    return adds_and_concats


def _unite(
    module: nn.Module, adds_and_concats: dict[Value, list[Value]], grids: dict[Value, Quantizer]
) -> None:
    """One quantizer for all operands and the result of a concatenation, and for those of the
    concatenations that share a tensor with it."""
    parents: dict[Quantizer, Quantizer] = {}

    def root(quantizer: Quantizer) -> Quantizer:
        while quantizer in parents:
            quantizer = parents[quantizer]
        return quantizer

    for result, operands in adds_and_concats.items():
        if result.function in CONCATENATIONS:
            kept = root(grids[result])
            for operand in operands:
                merged = root(grids[operand])
                if merged is not kept:
                    if merged.bits > kept.bits:
                        kept, merged = merged, kept
                    parents[merged] = kept
                    # Its errors matter to several readers.
                    kept.consumer = None
    for value in grids:
        grids[value] = root(grids[value])
    for child in module.modules():
        if isinstance(child, QUANTIZED_LAYERS) and isinstance(child.output_quantizer, Quantizer):
            child.output_quantizer = root(child.output_quantizer)
        if isinstance(child, _Watched):
            quantizers = child._quantized_results
            quantizers.update({key: root(quantizer) for key, quantizer in quantizers.items()})
    holder = getattr(module, RESULTS)
    for name, quantizer in list(holder.items()):
        holder[name] = root(quantizer)


def _quantize_sigmoids(traced: Trace, grids: dict[Value, Quantizer], step: float) -> None:
    """Put the sigmoid within SiLU on a grid of 8 bits where what it is computed of is on one."""
    quantized: dict[nn.Module, QuantSiLU] = {}
    for (parent, silu), values in traced.silus.items():
        grid_of = [grids.get(value) if value is not None else None for value in values]
        if all(grid is not None and grid.bits <= RESULT_BITS for grid in grid_of):
            made = quantized.setdefault(silu, QuantSiLU(step).train(silu.training))
            for name, child in parent._modules.items():
                if child is silu:
                    parent._modules[name] = made


def _quantize_functions(
    detector: Model,
    traced: Trace,
    grids: dict[Value, Quantizer],
    adds_and_concats: dict[Value, list[Value]],
    quantizer_of: Callable[[Value], Quantizer],
) -> None:
    """Quantize sums, concatenations, and what goes into them; `grids` is added to."""
    values: dict[Value, None] = {}
    for result, operands in adds_and_concats.items():
        values |= dict.fromkeys(
            [*(operand for operand in operands if operand not in grids), result]
        )
    holder = _Holder()
    quantizers: dict[Key, Quantizer] = {}
    for value, key in zip(values, traced.keys(list(values)), strict=True):
        grid_of = {grids.get(operand) for operand in value.operands}
        if key not in quantizers:
            only = grid_of.pop() if len(grid_of) == 1 else None
            if key.function in CONCATENATIONS | AVERAGES and only is not None:
                # Of tensors on one grid, as are the poolings of one: it is on it too.
                quantizers[key] = only
            else:
                quantizers[key] = quantizer_of(value)
            owner = traced.owner_of(value)
            assert owner is not None
            _watch(owner)[key.function, key.number] = quantizers[key]
            holder[_name(key)] = quantizers[key]
        grids[value] = quantizers[key]
    # So that their calls are not taken for those of the modules they are in.
    for module in traced.bystanders(list(values)):
        _watch(module)
    detector.module.add_module(RESULTS, holder)


def _name(key: Key) -> str:
    # With dots it would be a path.
    return f"{key.owner.replace('.', '/')}:{key.function}:{key.number}"


def _share_inputs(module: nn.Module, traced: Trace, grids: dict[Value, Quantizer]) -> None:
    """Give layers that read the same tensor one input quantizer, the tensor's own if it has one:
    on the same grid for the second time, rounding changes nothing."""
    first: dict[tuple[Value, int], Quantizer] = {}
    for name, values in traced.inputs.items():
        layer = module.get_submodule(name)
        value = values[0]
        if not isinstance(layer, QUANTIZED_LAYERS) or value is None:
            continue
        input_quantizer = layer.input_quantizer
        if value in grids:
            wanted = grids[value]
            if any(
                call_input is None or grids.get(call_input) is not wanted for call_input in values
            ):
                continue
        elif all(call_input is value for call_input in values):
            wanted = first.setdefault((value, input_quantizer.bits), input_quantizer)
        else:
            continue
        if (wanted.bits, wanted.asymmetric) == (input_quantizer.bits, input_quantizer.asymmetric):
            layer.input_quantizer = wanted


def output_quantizers(module: nn.Module) -> list[tuple[str, Quantizer]]:
    """(name, quantizer) of every layer's output and every function's result that is quantized."""
    quantizers = []
    for name, layer in module.named_modules():
        if not isinstance(layer, (QuantConv2d, QuantLinear)) or layer.output_quantizer is None:
            continue
        for inner, quantizer in layer.output_quantizer.named_modules(
            prefix=f"{name}.output_quantizer"
        ):
            if isinstance(quantizer, Quantizer):
                quantizers.append((inner, quantizer))
    holder = getattr(module, RESULTS, None)
    if isinstance(holder, nn.ModuleDict):
        for name, quantizer in holder.items():
            assert isinstance(quantizer, Quantizer)
            quantizers.append((f"{RESULTS}.{name}", quantizer))
    return quantizers


def count_adds_and_concats(detector: Model) -> tuple[int, int]:
    """How many of a detector's sums and concatenations of activations are quantized, and how many
    there are. BatchNorm may be unfolded."""
    layers = dict(detector.module.named_modules())
    traced = trace(detector, layers, through=lambda m: isinstance(m, Quantizer))
    adds_and_concats = [
        result for result in traced.adds_and_concats() if result.function not in AVERAGES
    ]
    every = {_name(key) for key in traced.keys(adds_and_concats)}
    holder = getattr(detector.module, RESULTS, None)
    there = set(holder) if isinstance(holder, nn.ModuleDict) else set()
    return len(every & there), len(every)


def requantize_results(module: nn.Module, replace: Callable[[Quantizer], nn.Module]) -> None:
    """Put something else in the places of the quantizers of functions' results, in place."""
    for child in module.modules():
        if isinstance(child, _Watched):
            quantizers: dict[Any, Any] = child._quantized_results
            quantizers.update({key: replace(quantizer) for key, quantizer in quantizers.items()})

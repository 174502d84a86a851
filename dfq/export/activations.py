"""How much memory activations take, found by watching one forward pass.

The definition. A tensor that is computed from the image takes memory from the operation that gives
it until the last one that reads it; the image is there from the beginning, and what the network
gives is there until its end. While an operation runs, what it reads and what it gives are there
together. The largest sum over all operations is the peak. Weights, and constants such as anchors,
are no activations. In detail:

- *Views* (slices, reshapes, transposed axes) are the tensor that they are views of, and what is
  written into a tensor takes that tensor's memory.
- *Functions of single values* (an activation function, a BatchNorm, a product with a constant)
  are computed as their operand is written, if nothing else reads the operand: the two are one
  tensor, as runtimes fuse them.
- *Bits.* A tensor that is read through quantizers alone is kept as their integers: at the bits of
  the grid, on each of the grids if there are several that differ, and in float if that is less. A
  tensor that anything reads in float is kept in float. What is chosen from a tensor on a grid, by
  a maximum or an index, is on that grid.
- What an operation needs inside itself (im2col buffers, say) is the runtime's own and not counted.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..graph.outline import LISTED
from ..models.base import Model
from ..quantization.quantizers import Quantizer

_BYTE = 8

# Beside what PyTorch itself marks as pointwise: copies, and normalisation with fixed statistics.
_POINTWISE = {
    *("clone", "_to_copy", "native_dropout", "native_batch_norm", "cudnn_batch_norm"),
    *("_native_batch_norm_legit_no_training", "_native_batch_norm_legit"),
}

# Each of their values is one of what they are given, or zero: what is on a grid stays on it.
_CHOOSING = {
    *("clone", "constant_pad_nd", "flip", "gather", "index", "index_select"),
    *("max_pool2d_with_indices", "relu", "repeat", "roll", "upsample_nearest2d"),
}

Grid = tuple[int, float, float]
"""Bits, logarithm of the step size, and zero point: two quantizers of one grid are one."""


@dataclass(eq=False)
class Activation:
    """A tensor that was computed from the image.

    Attributes:
        elements: how many numbers it has.
        float_bits: of each number where it is not quantized.
        born, last: first and last operation while which it is there.
        grids: those that it is read through; None: it is read in float.
        reads: how many operations read it.
        into: what is computed from it as it is written, so that it takes no memory; None: nothing.
    """

    elements: int
    float_bits: int
    born: int
    last: int
    grids: set[Grid | None] = field(default_factory=set)
    reads: int = 0
    into: Activation | None = None

    @property
    def bits(self) -> int:
        """Bits of each number as it is kept."""
        if self.into is not None:
            return self.into.bits
        widths = [self.float_bits if grid is None else grid[0] for grid in self.grids]
        return min(sum(widths), self.float_bits)

    def bytes(self, *, as_float: bool = False) -> int:
        """What it takes in memory, without gaps; nothing where nothing reads it."""
        if self.into is not None or not self.reads:
            return 0
        return -(-self.elements * (self.float_bits if as_float else self.bits) // _BYTE)


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        first, last: operations that it took.
        inputs: how many numbers each of its operands has.
        outputs: what it gave.
    """

    first: int
    last: int
    inputs: tuple[int, ...]
    outputs: tuple[Activation, ...]


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        activations: in the order in which they came to be.
        places: for each operation the name of the innermost module that made it; the first one,
            which reads the image, and the last one, which takes the outputs, are the caller's.
        calls: of layers of weights and products of activations, by name.
    """

    activations: list[Activation]
    places: list[str]
    calls: dict[str, list[Call]]

    def alive(self, *, as_float: bool = False) -> list[int]:
        """Bytes that are there while each operation runs; `as_float`: without any quantizer."""
        changes = [0] * (len(self.places) + 1)
        for activation in self.activations:
            size = activation.bytes(as_float=as_float)
            changes[activation.born] += size
            changes[activation.last + 1] -= size
        return list(itertools.accumulate(changes))[:-1]


@dataclass
class _Computed:
    """How an activation came to be: by which operation, of which others, and whether number by
    number and into the memory of one of them."""

    activation: Activation
    operands: list[Activation]
    pointwise: bool
    within: Activation | None


class _Watching(TorchDispatchMode):
    """Sees every operation on what is computed from the image."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and keeping the compiler away would load it: seconds.
        return False

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[_Computed] = []
        self.places = [""]
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self.within: list[str] = []
        self._silent = 0
        # By the storage's address, which stays its own while a weak reference is held.
        self._kept: dict[int, tuple[Activation, Grid | None]] = {}
        self._references: list[StorageWeakRef] = []

    def begin(self, image: Tensor) -> Activation:
        """Take an image to be the one that activations are computed from."""
        return self._new(image, [], pointwise=False, within=None)

    def end(self, outputs: list[Tensor]) -> None:
        """Take these tensors to be what the network gives."""
        self.places.append("")
        for tensor in outputs:
            if (known := self.look(tensor)) is not None:
                self._read(known[0], {known[1]})

    def look(self, tensor: Tensor) -> tuple[Activation, Grid | None] | None:
        """What a tensor is, or is a view of, and the grid it was put on; None: no activation."""
        return self._kept.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._silent:
            return result
        read: dict[Activation, set[Grid | None]] = defaultdict(set)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (known := self.look(leaf)) is not None:
                read[known[0]].add(known[1])
        writes = func._schema.is_mutable
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in outputs if writes or self.look(tensor) is None]
        # Whatever gives nothing but tensors that are there is a view.
        if not read or (outputs and not new):
            return result
        self.places.append(self.within[-1] if self.within else "")
        for activation, grids in read.items():
            self._read(activation, grids)
        name = func.overloadpacket.__name__.removesuffix("_")
        pointwise = torch.Tag.pointwise in func.tags or name in _POINTWISE
        for tensor in new:
            replaced = self.look(tensor)
            within = replaced[0] if replaced else None
            output = self._new(tensor, list(read), pointwise=pointwise, within=within)
            if tensor.is_floating_point() and name in _CHOOSING and len(read) == 1:
                (grids,) = read.values()
                (grid,) = grids if len(grids) == 1 else (None,)
                self._kept[tensor.untyped_storage()._cdata] = output, grid
        return result

    def _new(
        self,
        tensor: Tensor,
        operands: list[Activation],
        *,
        pointwise: bool,
        within: Activation | None,
    ) -> Activation:
        storage = tensor.untyped_storage()
        now = len(self.places) - 1
        size = tensor.element_size()
        activation = Activation(storage.nbytes() // size, size * _BYTE, now, now)
        self.computed.append(_Computed(activation, operands, pointwise, within))
        self._kept[storage._cdata] = activation, None
        self._references.append(StorageWeakRef(storage))
        return activation

    def _read(self, activation: Activation, grids: set[Grid | None]) -> None:
        activation.reads += 1
        activation.grids |= grids
        activation.last = len(self.places) - 1

    # ---- hooks

    def enter(self, name: str) -> None:
        self.within.append(name)

    def leave(self) -> None:
        self.within.pop()

    def hush(self) -> None:
        """What follows is done inside a quantizer."""
        self._silent += 1

    def put_on_grid(self, quantizer: Quantizer, operand: Tensor, result: Tensor) -> None:
        """The end of that: its result is what it was given, on a grid."""
        self._silent -= 1
        known = self.look(operand)
        storage = result.untyped_storage()
        if known is None or storage._cdata == operand.untyped_storage()._cdata:
            return
        activation, before = known
        state = (quantizer.log_scale.item(), quantizer.zero_point.item())
        grid = (quantizer.bits, *state)
        # On its second grid, it is still kept on the first.
        self._kept[storage._cdata] = activation, before or grid
        self._references.append(StorageWeakRef(storage))


@contextmanager
def _hooked(module: nn.Module, watch: _Watching) -> Iterator[None]:
    with ExitStack() as stack:
        for name, child in module.named_modules():
            if isinstance(child, Quantizer):
                if child.channels == 1:
                    _hook_quantizer(child, watch, stack)
                continue
            entered = child.register_forward_pre_hook(
                lambda _m, _i, name=name: watch.enter(name), prepend=True
            )
            left = child.register_forward_hook(lambda _m, _i, _o: watch.leave())
            stack.callback(entered.remove)
            stack.callback(left.remove)
            if isinstance(child, LISTED):
                _hook_layer(name, child, watch, stack)
        yield


def _hook_quantizer(quantizer: Quantizer, watch: _Watching, stack: ExitStack) -> None:
    begun = quantizer.register_forward_pre_hook(lambda _m, _i: watch.hush())
    ended = quantizer.register_forward_hook(
        lambda module, inputs, result: watch.put_on_grid(module, inputs[0], result)
    )
    stack.callback(begun.remove)
    stack.callback(ended.remove)


def _hook_layer(name: str, layer: nn.Module, watch: _Watching, stack: ExitStack) -> None:
    begun: list[int] = []

    def before(_m: nn.Module, _i: Any) -> None:
        begun.append(len(watch.places))

    def after(_m: nn.Module, inputs: Any, named: dict[str, Any], result: Any) -> None:
        operands = [leaf for leaf in (*inputs, *named.values()) if isinstance(leaf, Tensor)]
        output = result[0] if isinstance(result, tuple) else result
        known = watch.look(output)
        watch.calls[name].append(
            Call(
                begun.pop(),
                len(watch.places) - 1,
                tuple(tensor.numel() for tensor in operands),
                (known[0],) if known else (),
            )
        )

    stack.callback(layer.register_forward_pre_hook(before).remove)
    stack.callback(layer.register_forward_hook(after, with_kwargs=True).remove)


@torch.no_grad()
def watch_activations(detector: Model, image_size: int) -> Pass:
    """Run a detector on one image, and see when which activations are there.

    Args:
        detector: quantized or not, BatchNorm folded or not.
        image_size: side in pixels.
    """
    watch = _Watching()
    image = torch.zeros(1, 3, image_size, image_size, device=detector.device)
    input_activation = watch.begin(image)
    with _hooked(detector.module, watch), watch:
        raw = detector.raw(image)
    watch.end([leaf for leaf in tree_leaves(raw) if isinstance(leaf, Tensor)])
    for computed in watch.computed:
        _settle(computed, input_activation)
    return Pass(
        [computed.activation for computed in watch.computed], watch.places, dict(watch.calls)
    )


def _settle(computed: _Computed, image: Activation) -> None:
    """See whether an activation is one tensor with what it was computed from."""
    activation = computed.activation
    operand = computed.operands[0] if computed.pointwise and len(computed.operands) == 1 else image
    # The caller's image is there whatever is computed from it.
    alone = operand is not image and operand.reads == 1
    if alone and operand.elements == activation.elements:
        operand.into = activation
        activation.born = operand.born
    elif computed.within is not None:
        # Its place is the other's until this is written.
        activation.born += 1
        activation.last = max(activation.last, activation.born)

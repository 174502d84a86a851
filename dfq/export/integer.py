"""A program computed as a runtime computes it: in integers, operation by operation.

PyTorch runs a program's quantize and dequantize operations in float32. A runtime makes one integer
kernel of what stands between them. Both are right, and yet their results drift apart: where a value
lies within a rounding error of the boundary between two integers, one takes the one and the other
the other, the next layer hands that on to all it reaches, and a few layers further most values have
moved by a step. To tell a fault from that, what the kernels do is done here once more: exact
integer sums, then one float32 factor, then the nearest even integer. Then a file's outputs agree
to the last bits, or something is wrong with it.

OpenVINO computes in float32 what stands between integer sums and the next grid: there the same
holds of each of its steps, its own SiLU among them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .kernels import LiteRtKernels, OnnxRuntimeKernels
from .kernels_openvino import OpenVinoKernels, Unquantized
from .on_grid import Grid, OnGrid
from .passes import DEQUANTIZE, KEEPING, QUANTIZE, SPLITTING, grid_at
from .program import Program

_ATEN = torch.ops.aten
_PER_CHANNEL = torch.ops.quantized_decomposed.dequantize_per_channel.default
_QUANTIZE_CHANNELS = torch.ops.quantized_decomposed.quantize_per_channel.default

ENLARGING = {_ATEN.upsample_bilinear2d.vec, _ATEN.upsample_bilinear2d.default}
AVERAGES = {_ATEN.avg_pool2d.default, _ATEN.adaptive_avg_pool2d.default, *ENLARGING}
"""Give values between those that they are given."""

_CONVOLUTIONS = {_ATEN.conv2d.default, _ATEN.conv2d.padding}
_LAYERS = {*_CONVOLUTIONS, _ATEN.linear.default}

_ACTIVATIONS = {_ATEN.silu.default, _ATEN.relu.default}
"""That OpenVINO computes within the layer in front of them."""

KERNELS: dict[str, OnnxRuntimeKernels | OpenVinoKernels] = {
    "onnxruntime": OnnxRuntimeKernels(),
    "litert": LiteRtKernels(),
    "openvino": OpenVinoKernels(),
}
"""Runtimes whose arithmetic between grids is known to the bit."""


@torch.no_grad()
def run_in_integers(program: Program, images: Tensor, runtime: str) -> dict[str, Tensor]:
    """A program's outputs as a runtime's integer kernels give them.

    Args:
        program: built for that runtime.
        images: `(n, 3, h, w)` in [0, 1].
        runtime: a key of `KERNELS`.

    Returns:
        Outputs by name, as the runtime's file has them.
    """
    kernels = KERNELS[runtime]
    interpreter: _Interpreter = (
        _FloatBetween(program, kernels)
        if isinstance(kernels, OpenVinoKernels)
        else _Requantizing(program, kernels)
    )
    outputs = _values(interpreter.run(images))
    return dict(zip(program.outputs, outputs, strict=True))


class _Interpreter(fx.Interpreter):
    """Runs a graph with tensors on grids as `OnGrid`."""

    kernels: OnnxRuntimeKernels | OpenVinoKernels

    def __init__(self, program: Program) -> None:
        super().__init__(program.exported.module())
        self.fused = {
            node.args[0]: node
            for node in self.module.graph.nodes
            if node.target is QUANTIZE and len(node.args[0].users) == 1
        }
        """Operations whose only consumer puts them on a grid."""
        self.rectified = {
            relu.args[0]
            for relu in list(self.fused)
            if relu.target is _ATEN.relu.default
            and relu.args[0].target is _ATEN.add.Tensor
            and len(relu.args[0].users) == 1
        }
        """Sums that a ReLU and a quantize follow, all one operation."""
        for total in self.rectified:
            (relu,) = total.users
            self.fused[total] = self.fused[relu]

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is _ATEN.relu.default and isinstance(args[0], _Done):
            return args[0]
        if n.target is DEQUANTIZE:
            grid: Grid = tuple(args[1:6])
            scale = self.kernels.scale(grid)
            read = any(reader.target is _ATEN.cat.default for reader in n.users)
            return OnGrid(args[0].double(), scale, *grid[1:4], grid=grid, joined=read)
        if n.target is _PER_CHANNEL:
            integers, scale, _, axis, low, high, *_ = args
            return OnGrid(integers.double(), scale.float(), 0, low, high, axis)
        if n.target is _QUANTIZE_CHANNELS:
            return super().run_node(n)
        if n.target is QUANTIZE:
            if isinstance(args[0], _Done):
                return args[0].integers
            x = args[0]
            if isinstance(x, OnGrid):
                return self.kernels.move(x, args[1:6])
            return self.kernels.quantize(x, args[1:6])
        if n.target in KEEPING or n.target in SPLITTING or n.target is operator.getitem:
            return self._keep(n, args, kwargs)
        if n.target is _ATEN.cat.default:
            joined = self._join(n, args)
            if joined is not None:
                return joined
        if n in self.fused:
            grid = tuple(self.fused[n].args[1:6])
            requantized = self._kernel(n, args, grid)
            if requantized is not None:
                return _Done(requantized)
        if n.target is _ATEN.matmul.default and all(isinstance(a, OnGrid) for a in args):
            a, b = args
            sums = (a.integers - a.zero_point) @ (b.integers - b.zero_point)
            return sums.float() * (a.scale * b.scale)
        return self._plain(n, args, kwargs)

    def _plain(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """An operation on float32 values."""
        plain = [_values(value) for value in args]
        return n.target(*plain, **{k: _values(v) for k, v in kwargs.items()})

    def _keep(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """What moves values about, done to the integers."""
        x = args[0]
        if isinstance(x, OnGrid) and x.axis is None:
            # Padding of a pool is below all; of zeros there is none among these.
            integers = n.target(x.integers, *args[1:], **kwargs)
            if isinstance(integers, list | tuple):
                return [x.with_integers(part) for part in integers]
            return _Done(integers) if self._same_grid(n, x) else x.with_integers(integers)
        if isinstance(x, list | tuple) and n.target is operator.getitem:
            part = x[args[1]]
            same = isinstance(part, OnGrid) and self._same_grid(n, part)
            return _Done(part.integers) if same else part
        return n.target(_values(x), *args[1:], **kwargs)

    def _join(self, n: fx.Node, args: Any) -> OnGrid | _Done | None:
        """A concatenation of what is on grids; None where something is on none, or nothing says on
        which of several they are to be."""
        parts, *rest = args
        if not all(isinstance(part, OnGrid) and part.axis is None for part in parts):
            return None
        first = parts[0]
        if n in self.fused:
            grid: Grid = tuple(self.fused[n].args[1:6])
            return _Done(torch.cat([self._moved(part, grid) for part in parts], *rest))
        if all(part.grid == first.grid for part in parts):
            return first.with_integers(torch.cat([part.integers for part in parts], *rest))
        return None

    def _same_grid(self, n: fx.Node, x: OnGrid) -> bool:
        """Whether the only consumer puts it on the grid that it is on."""
        consumer = self.fused.get(n)
        return consumer is not None and x.grid == tuple(consumer.args[1:6])

    def _kernel(self, n: fx.Node, args: Any, grid: Grid) -> Tensor | None:
        """An operation and the quantize behind it as one kernel; None: there is no such kernel."""
        return None

    def _moved(self, x: OnGrid, grid: Grid) -> Tensor:
        return x.integers if x.grid == grid else self.kernels.move(x, grid)


class _Requantizing(_Interpreter):
    """Where an operation and the quantize behind it are one integer kernel."""

    def __init__(self, program: Program, kernels: OnnxRuntimeKernels) -> None:
        super().__init__(program)
        self.kernels: OnnxRuntimeKernels = kernels

    def _kernel(self, n: fx.Node, args: Any, grid: Grid) -> Tensor | None:
        target, kernels = n.target, self.kernels
        if target in _LAYERS:
            layer = _sums(n, args)
            if layer is None:
                return None
            sums, x, weight, bias, shape = layer
            if bias is not None:
                sums = sums + kernels.bias(bias, x.scale, weight.scale).view(shape)
            factor = kernels.layer_factor(x, weight, grid).expand(len(weight.integers))
            return kernels.requantize(sums, factor.view(shape), grid)
        if target is _ATEN.sigmoid.default and isinstance(args[0], OnGrid):
            return kernels.sigmoid(args[0], grid)
        if target in AVERAGES and isinstance(args[0], OnGrid):
            x, *rest = args
            if x.grid == grid:
                pools = target not in ENLARGING

                def average(tensor: Tensor) -> Tensor:
                    result: Tensor = target(tensor, *rest)
                    return result

                return kernels.average(x, average, grid, pools=pools)
        if target in (_ATEN.mul.Tensor, _ATEN.add.Tensor):
            a, b = args[:2]
            if isinstance(a, OnGrid) and isinstance(b, OnGrid):
                kernel = kernels.multiply if target is _ATEN.mul.Tensor else kernels.add
                integers = kernel(a, b, grid)
                return integers.clamp(min=grid[1]) if n in self.rectified else integers
        return super()._kernel(n, args, grid)


class _FloatBetween(_Interpreter):
    """Where float32 stands between the integer sums of a layer and the next grid."""

    def __init__(self, program: Program, kernels: OpenVinoKernels) -> None:
        super().__init__(program)
        self.kernels: OpenVinoKernels = kernels
        self.sums = {
            node: plan
            for node in self.fused
            if node.target is _ATEN.add.Tensor and (plan := self._sum_on_grids(node)) is not None
        }
        """Sums of operands on different grids, or of a layer's own that is on one already."""
        self.unrounded: dict[fx.Node, Unquantized] = {
            plan.unrounded: Unquantized(torch.empty(0))
            for plan in self.sums.values()
            if plan.unrounded is not None
        }
        """What layers gave before they put it on a grid, where a sum in them is of that."""

    def _kernel(self, n: fx.Node, args: Any, grid: Grid) -> Tensor | None:
        if n.target in _LAYERS or n.target in _ACTIVATIONS:
            unquantized = self._unquantized(n, args)
            if n in self.unrounded:
                self.unrounded[n] = unquantized
            return self.kernels.quantize_in_layer(unquantized, grid)
        if n.target is _ATEN.avg_pool2d.default:
            return self.kernels.quantize_in_layer(Unquantized(self._plain(n, args, {})), grid)
        if n.target is _ATEN.add.Tensor:
            if n in self.sums:
                return self._add_on_grids(n, args, grid)
            a, b = args[:2]
            if isinstance(a, Tensor) and isinstance(b, OnGrid):
                a, b = b, a
            if isinstance(a, OnGrid) and isinstance(b, Tensor):
                return self.kernels.add(a, b, grid, relu=n in self.rectified)
        return super()._kernel(n, args, grid)

    def _plain(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        if n.target is _ATEN.silu.default:
            return self.kernels.silu(_values(args[0]))
        layer = _sums(n, args) if n.target in _LAYERS else None
        if layer is None:
            return super()._plain(n, args, kwargs)
        sums, x, weight, bias, shape = layer
        factor = (x.scale * weight.scale).view(shape)
        return self.kernels.layer(sums, factor, None if bias is None else bias.view(shape))

    def _unquantized(self, n: fx.Node, args: Any) -> Unquantized:
        """What a layer, or an activation function, gives before it is put on a grid."""
        layer = _sums(n, args) if n.target in _CONVOLUTIONS else None
        if layer is None or layer[3] is not None:
            return Unquantized(self._plain(n, args, n.kwargs))
        sums, x, weight, _, shape = layer
        return Unquantized(sums.float(), (x.scale * weight.scale).view(shape))

    def _add_on_grids(self, n: fx.Node, args: Any, grid: Grid) -> Tensor:
        plan = self.sums[n]
        return self.kernels.add(
            args[plan.moved],
            args[1 - plan.moved],
            grid,
            relu=n in self.rectified,
            in_layer=plan.in_layer,
            unrounded=None if plan.unrounded is None else self.unrounded[plan.unrounded],
            signed=not self._only_activated(n),
        )

    def _only_activated(self, n: fx.Node) -> bool:
        """Whether nothing but activation functions reads what a node gives on a grid."""
        readers = [reader for put in self.fused[n].users for reader in put.users]
        return all(reader.target in _ACTIVATIONS for reader in readers)

    def _sum_on_grids(self, n: fx.Node) -> _Sum | None:
        """How a sum is computed one or both of whose operands are on grids; None where another
        operation puts the one that is on a grid there, and the other one is on none."""
        operands = n.args[:2]
        if not all(isinstance(operand, fx.Node) for operand in operands):
            return None
        on_grid = [_is_on_grid(operand) for operand in operands]
        layers = [self._layer(operand) for operand in operands]
        if all(on_grid):
            moved = self._which_moves(operands, layers)
            # The layer does not wait for what others read as well.
            waits = len(operands[1 - moved].users) == 1
        elif any(layers):
            moved = on_grid.index(True)
            # Where that comes out of a layer too, the sum is part of the latter.
            waits = not self._ends_layer(operands[1 - moved])
        else:
            return None
        # Nor does it for what is as large as the sum only after it is repeated.
        shapes = {tuple(operand.meta["val"].shape) for operand in operands}
        waits = waits and len(shapes) == 1
        layer = layers[moved]
        rounds = layer is None or layer.target not in _CONVOLUTIONS or not waits
        return _Sum(moved, any(layers), None if rounds else layer)

    def _which_moves(self, operands: Any, layers: list[fx.Node | None]) -> int:
        """Which of two operands on grids is put in steps of the other."""
        several = [len(operand.users) > 1 for operand in operands]
        if several[0] != several[1]:
            return several.index(False)
        direct = [layer is not None and layer.target in _CONVOLUTIONS for layer in layers]
        return direct.index(True) if any(direct) else 0

    def _layer(self, operand: fx.Node) -> fx.Node | None:
        """What gives a layer's result, the activation function included, where nothing but a sum
        reads it, and on a grid; None where it is anything else."""
        if operand.target is not DEQUANTIZE or len(operand.users) > 1:
            return None
        quantize = operand.args[0]
        if quantize.target is not QUANTIZE or len(quantize.users) > 1:
            return None
        return quantize.args[0] if self._ends_layer(quantize.args[0]) else None

    def _ends_layer(self, node: fx.Node) -> bool:
        """Whether a node is a convolution, or the activation function of one, read once."""
        if node.target in _ACTIVATIONS and len(node.users) == 1:
            node = node.args[0]
        return node.target in _CONVOLUTIONS and len(node.users) == 1


@dataclass(frozen=True)
class _Sum:
    """How OpenVINO adds what is on grids.

    Attributes:
        moved: place of the operand that is put in steps of the other one, or that has a grid.
        in_layer: whether a layer gives an operand, and so does the sum.
        unrounded: what gives that layer's result, where it is added without being rounded.
    """

    moved: int
    in_layer: bool
    unrounded: fx.Node | None


def _sums(n: fx.Node, args: Any) -> tuple[Tensor, OnGrid, OnGrid, Tensor | None, list[int]] | None:
    """A layer's integer sums, its operands, and the shape of what is a channel's; None where it is
    not computed of integers."""
    x, weight, bias, *rest = (*args, None) if len(args) == 2 else args
    if not (isinstance(x, OnGrid) and isinstance(weight, OnGrid)):
        return None
    linear = n.target is _ATEN.linear.default
    function = F.linear if linear else F.conv2d
    sums = function(x.integers - x.zero_point, weight.integers, None, *rest)
    return sums, x, weight, bias, [-1] if linear else [-1, 1, 1]


def _is_on_grid(node: fx.Node) -> bool:
    """Whether a tensor is on a grid: as it comes, or joined of such as are on one and the same."""
    if node.target is _ATEN.cat.default:
        grids = {grid_at(part) for part in node.args[0]}
        return len(grids) == 1 and None not in grids
    return grid_at(node) is not None


@dataclass(frozen=True)
class _Done:
    """An operation's result, on its consumer's grid already."""

    integers: Tensor


def _values(value: Any) -> Any:
    if isinstance(value, OnGrid):
        return value.values()
    if isinstance(value, list | tuple):
        return type(value)(_values(part) for part in value)
    return value

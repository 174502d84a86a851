"""A program computed as a runtime computes it: in integers, operation by operation.

PyTorch runs a program's quantize and dequantize operations in float32. A runtime makes one integer
kernel of what stands between them. Both are right, and yet their results drift apart: where a value
lies within a rounding error of the boundary between two integers, one takes the one and the other
the other, the next layer hands that on to all it reaches, and a few layers further most values have
moved by a step. To tell a fault from that, what the kernels do is done here once more: exact
integer sums, then one float32 factor, then the nearest even integer. Then a file's outputs agree
to the last bits, or something is wrong with it.

Rules of onnxruntime's CPU kernels (MLAS) and of LiteRT's (XNNPACK) are in `KERNELS`. OpenVINO's
computes what follows a convolution in float32 with functions of its own: there the two cannot agree
to the bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .passes import DEQUANTIZE, KEEPING, QUANTIZE, SPLITTING
from .program import Program

_ATEN = torch.ops.aten
_PER_CHANNEL = torch.ops.quantized_decomposed.dequantize_per_channel.default
_QUANTIZE_CHANNELS = torch.ops.quantized_decomposed.quantize_per_channel.default

ENLARGING = {_ATEN.upsample_bilinear2d.vec, _ATEN.upsample_bilinear2d.default}
AVERAGES = {_ATEN.avg_pool2d.default, _ATEN.adaptive_avg_pool2d.default, *ENLARGING}
"""Give values between those that they are given."""


@dataclass(frozen=True)
class OnGrid:
    """A tensor on a grid.

    Attributes:
        integers: float64 whole numbers, of any shape.
        scale: float32, a scalar or `(channels,)`.
        zero_point: whole number.
        low, high: of the integer type.
        axis: of the channels; None per tensor.
    """

    integers: Tensor
    scale: Tensor
    zero_point: int
    low: int
    high: int
    axis: int | None = None

    def values(self) -> Tensor:
        """float32."""
        scale = self.scale
        if self.axis is not None:
            shape = [1] * self.integers.ndim
            shape[self.axis] = -1
            scale = scale.view(shape)
        return (self.integers - self.zero_point).float() * scale

    def with_integers(self, integers: Tensor) -> OnGrid:
        """Others on the same grid."""
        return OnGrid(integers, self.scale, self.zero_point, self.low, self.high, self.axis)


Grid = tuple[float, int, int, int, torch.dtype]


def _clamped(integers: Tensor, grid: Grid) -> Tensor:
    return integers.clamp(grid[2], grid[3])


def _float(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float32)


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c`, rounded to float32 once, as the processor's instruction does."""
    return (a.double() * b.double() + c.double()).float()


class OnnxRuntimeKernels:
    """What onnxruntime's integer kernels compute, float32 factors and all."""

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        return _clamped(torch.round(x / _float(grid[0])).double() + grid[1], grid)

    def requantize(self, sums: Tensor, factor: Tensor, grid: Grid) -> Tensor:
        """Whole `sums` times a float32 factor, to the nearest even integer."""
        return _clamped(torch.round(sums.float() * factor).double() + grid[1], grid)

    def bias(self, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """As whole numbers of the products' own step, of the scales of input and weight."""
        return torch.round(bias / (x * weight)).double()

    def layer_factor(self, x: OnGrid, weight: OnGrid, grid: Grid) -> Tensor:
        return x.scale * weight.scale / _float(grid[0])

    def multiply(self, a: OnGrid, b: OnGrid, grid: Grid) -> Tensor:
        product = (a.integers - a.zero_point) * (b.integers - b.zero_point)
        return self.requantize(product, a.scale * b.scale / _float(grid[0]), grid)

    def add(self, a: OnGrid, b: OnGrid, grid: Grid) -> Tensor:
        left, right = a.scale / _float(grid[0]), b.scale / _float(grid[0])
        zeros = _fused(left, _float(a.zero_point), right * b.zero_point)
        total = _fused(b.integers, right, _float(grid[1]) - zeros)
        return _clamped(torch.round(_fused(a.integers, left, total)).double(), grid)

    def average(
        self, x: OnGrid, function: Callable[[Tensor], Tensor], grid: Grid, *, pools: bool
    ) -> Tensor:
        """A pooling (`pools`) or an enlargement of what is on the grid that the result is on."""
        if not pools:
            return self.quantize(function(x.values()), grid)
        # Halves are frequent, and which integer is even is seen with the zero point.
        steps = function(x.values()) / _float(grid[0]) + _float(grid[1])
        return _clamped(torch.round(steps).double(), grid)

    def sigmoid(self, x: OnGrid, grid: Grid) -> Tensor:
        return self.table(x, torch.sigmoid, grid)

    def move(self, x: OnGrid, grid: Grid) -> Tensor:
        """The same values on another grid."""
        return self.table(x, lambda values: values, grid)

    def table(self, x: OnGrid, function: Callable[[Tensor], Tensor], grid: Grid) -> Tensor:
        """A function of each integer, looked up."""
        integers = torch.arange(x.low, x.high + 1, dtype=torch.float64)
        table = self.quantize(function(x.with_integers(integers).values()), grid)
        return table[(x.integers - x.low).long()]


class LiteRtKernels(OnnxRuntimeKernels):
    """What XNNPACK's kernels compute for LiteRT."""

    def bias(self, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        # Its converter divides in double precision.
        return torch.round(bias.double() / (x.double() * weight.double()))

    def add(self, a: OnGrid, b: OnGrid, grid: Grid) -> Tensor:
        left = float(a.scale / _float(grid[0]))
        right = float(b.scale / _float(grid[0]))
        # Fixed point of 20 bits or so, rounded half up.
        most = max(left, right)
        shift = 20 - _exponent(most)
        factors = [round(side * 2.0**shift) for side in (left, right)]
        total = 2.0 ** (shift - 1) - factors[0] * a.zero_point - factors[1] * b.zero_point
        total = total + a.integers * factors[0] + b.integers * factors[1]
        return _clamped(torch.floor(total / 2.0**shift) + grid[1], grid)

    def average(
        self, x: OnGrid, function: Callable[[Tensor], Tensor], grid: Grid, *, pools: bool
    ) -> Tensor:
        averages = function(x.integers)
        # Halves go away from the integer 0 in a pooling, which knows of no zero point, else up.
        nearest = (
            averages.sign() * (averages.abs() + 0.5).floor() if pools else (averages + 0.5).floor()
        )
        return _clamped(nearest, grid)


def _exponent(number: float) -> int:
    return int(torch.frexp(torch.tensor(number, dtype=torch.float64))[1]) - 1


KERNELS: dict[str, OnnxRuntimeKernels] = {
    "onnxruntime": OnnxRuntimeKernels(),
    "litert": LiteRtKernels(),
}
"""Runtimes whose integer arithmetic is known to the bit."""


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
    interpreter = _Interpreter(program, KERNELS[runtime])
    outputs = _values(interpreter.run(images))
    return dict(zip(program.outputs, outputs, strict=True))


class _Interpreter(fx.Interpreter):
    """Runs a graph with tensors on grids as `OnGrid`."""

    def __init__(self, program: Program, kernels: OnnxRuntimeKernels) -> None:
        super().__init__(program.exported.module())
        self.kernels = kernels
        self.fused = {
            node.args[0]: node
            for node in self.module.graph.nodes
            if node.target is QUANTIZE and len(node.args[0].users) == 1
        }
        """Operations whose only consumer puts them on a grid."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is DEQUANTIZE:
            return OnGrid(args[0].double(), _float(args[1]), *args[2:5])
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
        if n in self.fused:
            grid: Grid = tuple(self.fused[n].args[1:6])
            requantized = self._kernel(n, args, grid)
            if requantized is not None:
                return _Done(requantized)
        if n.target is _ATEN.matmul.default and all(isinstance(a, OnGrid) for a in args):
            a, b = args
            sums = (a.integers - a.zero_point) @ (b.integers - b.zero_point)
            return sums.float() * (a.scale * b.scale)
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

    def _same_grid(self, n: fx.Node, x: OnGrid) -> bool:
        """Whether the only consumer puts it on the grid that it is on."""
        consumer = self.fused.get(n)
        return consumer is not None and (consumer.args[1], consumer.args[2]) == (
            float(x.scale),
            x.zero_point,
        )

    def _kernel(self, n: fx.Node, args: Any, grid: Grid) -> Tensor | None:
        """An operation and the quantize behind it as one kernel; None: there is no such kernel."""
        target, kernels = n.target, self.kernels
        if target in (_ATEN.conv2d.default, _ATEN.conv2d.padding, _ATEN.linear.default):
            x, weight, bias, *rest = (*args, None) if len(args) == 2 else args
            if not (isinstance(x, OnGrid) and isinstance(weight, OnGrid)):
                return None
            function = F.linear if target is _ATEN.linear.default else F.conv2d
            sums = function(x.integers - x.zero_point, weight.integers, None, *rest)
            shape = [-1] if target is _ATEN.linear.default else [-1, 1, 1]
            if bias is not None:
                sums = sums + kernels.bias(bias, x.scale, weight.scale).view(shape)
            factor = kernels.layer_factor(x, weight, grid).expand(len(weight.integers))
            return kernels.requantize(sums, factor.view(shape), grid)
        if target is _ATEN.sigmoid.default and isinstance(args[0], OnGrid):
            return kernels.sigmoid(args[0], grid)
        if target in AVERAGES and isinstance(args[0], OnGrid):
            x, *rest = args
            if (float(x.scale), x.zero_point) == grid[:2]:
                pools = target not in ENLARGING

                def average(tensor: Tensor) -> Tensor:
                    result: Tensor = target(tensor, *rest)
                    return result

                return kernels.average(x, average, grid, pools=pools)
        if target in (_ATEN.mul.Tensor, _ATEN.add.Tensor):
            a, b = args[:2]
            if isinstance(a, OnGrid) and isinstance(b, OnGrid):
                kernel = kernels.multiply if target is _ATEN.mul.Tensor else kernels.add
                return kernel(a, b, grid)
        if target is _ATEN.cat.default and all(isinstance(part, OnGrid) for part in args[0]):
            parts = [self._moved(part, grid) for part in args[0]]
            return torch.cat(parts, *args[1:])
        return None

    def _moved(self, x: OnGrid, grid: Grid) -> Tensor:
        if (float(x.scale), x.zero_point) == grid[:2]:
            return x.integers
        return self.kernels.move(x, grid)


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

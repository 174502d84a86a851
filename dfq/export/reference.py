"""What a file is compared with: the reference program, run by PyTorch; and how far two correct
executions of it are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from .passes import DEQUANTIZE, QUANTIZE
from .program import OPS, Program

_QUANTIZE_CHANNELS = OPS.quantize_per_channel.default
_DEQUANTIZE_CHANNELS = OPS.dequantize_per_channel.default
_BIASED = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}


@torch.no_grad()
def reference_outputs(
    program: Program, images: Tensor, *, otherwise: bool = False
) -> dict[str, np.ndarray]:
    """Outputs by name of the reference program.

    Args:
        program: of the file.
        images: float32 `(n, 3, h, w)` in [0, 1].
        otherwise: the same program as another runtime might as rightly compute it: sums in
            float64, and biases on the grids of integer accumulators.
    """
    module = program.module()
    fixed = len(images) if program.dynamic else _batch_of(program)
    rows = []
    for part in images.split(fixed):
        given = torch.cat([part, part[:1].expand(fixed - len(part), -1, -1, -1)])
        found = _Otherwise(module).run(given.double()) if otherwise else module(given)
        rows.append([value[: len(part)] for value in found])
    whole = [torch.cat(parts).float().numpy() for parts in zip(*rows, strict=True)]
    return dict(zip(program.outputs, whole, strict=True))


def _batch_of(program: Program) -> int:
    node = next(n for n in program.exported.graph.nodes if n.name == "images")
    return int(node.meta["val"].shape[0])


class _Otherwise(fx.Interpreter):
    """Runs a program in float64; every grid stays the same."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return _wide(value)

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "call_function" and node.target in _BIASED and len(node.args) > 2:
            return self._with_rounded_bias(node)
        return super().run_node(node)

    def _with_rounded_bias(self, node: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        x, weight = node.args[:2]
        if (
            args[2] is not None
            and getattr(x, "target", None) is DEQUANTIZE
            and getattr(weight, "target", None) is _DEQUANTIZE_CHANNELS
        ):
            scales = self.fetch_args_kwargs_from_env(weight)[0][1]  # type: ignore[arg-type]
            step = scales.double() * x.args[1]  # type: ignore[union-attr]
            args = (*args[:2], torch.round(args[2] / step) * step, *args[3:])
        return self.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is QUANTIZE:
            x, scale, zero_point, low, high, _ = args
            return (torch.round(x / scale) + zero_point).clamp(low, high)
        if target is DEQUANTIZE:
            integers, scale, zero_point = args[:3]
            return (integers - zero_point) * scale
        if target in (_QUANTIZE_CHANNELS, _DEQUANTIZE_CHANNELS):
            x, scale, _, axis, low, high, _ = args
            shape = [1] * x.ndim
            shape[axis] = -1
            scale = scale.double().view(shape)
            if target is _DEQUANTIZE_CHANNELS:
                return x.double() * scale
            return torch.round(x / scale).clamp(low, high)
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in kwargs.items()}
        return _wide(super().call_function(target, args, kwargs))


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value

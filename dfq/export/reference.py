"""What a file is compared with: the reference program, computed as the file's runtime computes it
where that is known to the bit, else by PyTorch; and how far two correct executions are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from ..models.base import Model
from .exported import ExportedModel, ExportInfo
from .integer import KERNELS, run_in_integers
from .parity import TIMES_FLOOR, TIMES_FLOOR_APPROXIMATE, WITHIN_ONE, Parity, distance, parity
from .passes import DEQUANTIZE, QUANTIZE
from .program import Program, build, input_shape
from .written import OPS

_QUANTIZE_CHANNELS = OPS.quantize_per_channel.default
_DEQUANTIZE_CHANNELS = OPS.dequantize_per_channel.default


@torch.no_grad()
def reference_outputs(
    program: Program, images: Tensor, runtime: str, *, otherwise: bool = False
) -> dict[str, np.ndarray]:
    """Outputs by name of the reference program.

    Args:
        program: of the file.
        images: float32 `(n, 3, h, w)` in [0, 1].
        runtime: whose arithmetic counts.
        otherwise: the same program computed in another way that is as right: in float64.
    """
    module = program.module()
    exact = runtime in KERNELS and _is_quantized(program)

    def execute(part: Tensor) -> list[Tensor]:
        if otherwise:
            return list(_Wide(module).run(part.double()))
        if exact:
            return list(run_in_integers(program, part, runtime).values())
        return list(module(part))

    fixed = input_shape(program.exported)[0] or len(images)
    rows = []
    for part in images.split(fixed):
        filled = torch.cat([part, part[:1].expand(fixed - len(part), -1, -1, -1)])
        rows.append([output[: len(part)] for output in execute(filled)])
    arrays = [torch.cat(parts).float().numpy() for parts in zip(*rows, strict=True)]
    return dict(zip(program.outputs, arrays, strict=True))


def program_of(info: ExportInfo, source: Model) -> Program:
    """The reference program of a file, from what that says of itself and the network that it was
    lowered from."""
    return build(
        source,
        info.runtime,
        image_size=info.image_size,
        dynamic=info.dynamic,
        batch=info.batch or 1,
    )


def parity_of(file: ExportedModel, source: Model, images: np.ndarray) -> Parity:
    """How far a file's outputs are from those of the network that it was lowered from.

    Args:
        file: that dfq wrote.
        source: with quantizers where the file's runtime has them.
        images: float32 `(n, 3, h, w)` in [0, 1].
    """
    info, program = file.info, program_of(file.info, source)
    pixels = torch.from_numpy(images)
    expected, actual = reference_outputs(program, pixels, info.runtime), file.run(images)
    same = all(
        name in actual
        and actual[name].shape == output.shape
        and distance(output, actual[name]).share_within_one >= WITHIN_ONE
        for name, output in expected.items()
    )
    # The floor takes its time, and has a say only where outputs differ.
    floor = None if same else reference_outputs(program, pixels, info.runtime, otherwise=True)
    # Its steps are those of processors with fused multiplications; others take them otherwise.
    times = TIMES_FLOOR_APPROXIMATE if info.runtime == "openvino" else TIMES_FLOOR
    return parity(expected, actual, floor, times)


def _is_quantized(program: Program) -> bool:
    return any(node.target is QUANTIZE for node in program.exported.graph.nodes)


class _Wide(fx.Interpreter):
    """Runs a program in float64; every grid stays the same."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return _wide(value)

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

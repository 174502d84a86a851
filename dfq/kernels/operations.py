"""The C functions as operations of PyTorch, `torch.ops.dfq`: what traces or compiles a program
takes each for one step, and knows which tensors it writes.

They check nothing: dtypes, shapes and layouts have to be those that the C file names (see
`row_step` for gradients). Gradients are not theirs to give, for that of the statistics is known
only when the whole pass is through: the `torch.autograd.Function`s of `synthesis` call those for
the way back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .loader import call

_SCHEMAS = {
    "moments": "(Tensor x, Tensor expected, Tensor(a!) mean, Tensor(b!) var) -> ()",
    "silu_and_moments": (
        "(Tensor x, Tensor(a!) out, Tensor expected, Tensor(b!) mean, Tensor(c!) var) -> ()"
    ),
    "add_linear": "(Tensor x, Tensor grad, Tensor(a!) out, Tensor slope, Tensor offset) -> ()",
    "silu_backward": "(Tensor x, Tensor grad, Tensor(a!) out, Tensor slope, Tensor offset) -> ()",
    "view": "(Tensor pixels, Tensor(a!) view, Tensor flipped, Tensor erased) -> ()",
    "view_backward": "(Tensor grad, Tensor(a!) out, Tensor flipped, Tensor erased) -> ()",
    "variation": "(Tensor images, Tensor(a!) gradient, Tensor(b!) sums) -> ()",
    "halved": "(Tensor images, Tensor(a!) out) -> ()",
    "add_doubled": "(Tensor grid, Tensor(a!) out) -> ()",
}


def implementation(name: str) -> Callable[..., None]:
    """What an operation calls."""
    return _PIXELS.get(name) or _of_a_layer(name)


def _of_a_layer(name: str) -> Callable[..., None]:
    def run(x: Tensor, *others: Tensor) -> None:
        channels = x.shape[1]
        call(name, x.dtype, (x, *others), x.numel() // channels, channels)

    def run_back(x: Tensor, grad: Tensor, *others: Tensor) -> None:
        channels, apart = x.shape[1], row_step(grad)
        assert apart is not None
        call(name, x.dtype, (x, grad, *others), x.numel() // channels, channels, apart)

    return run_back if name in ("add_linear", "silu_backward") else run


def row_step(x: Tensor) -> int | None:
    """How many values lie between the places of `x` `(n, c, h, w)` in memory, its channels side by
    side; None where they do not, or places do not follow each other evenly."""
    count, channels, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        return channels
    step, before = None, 1
    for size, stride in ((width, x.stride(3)), (height, x.stride(2)), (count, x.stride(0))):
        if size > 1:
            step = stride // before if step is None else step
            if stride != step * before:
                return None
        before *= size
    step = channels if step is None else step
    return step if step >= channels and (channels == 1 or x.stride(1) == 1) else None


def _view(pixels: Tensor, view: Tensor, flipped: Tensor, erased: Tensor) -> None:
    count, _, height, width = pixels.shape
    row = pixels.new_empty(3 * width)
    call("view", view.dtype, (pixels, view, flipped, erased, row), count, height, width)


def _view_backward(grad: Tensor, out: Tensor, flipped: Tensor, erased: Tensor) -> None:
    count, _, height, width = grad.shape
    call("view_backward", grad.dtype, (grad, out, flipped, erased), count, height, width)


def _variation(images: Tensor, gradient: Tensor, sums: Tensor) -> None:
    count, channels, height, width = images.shape
    row = images.new_empty(width + 2)
    sizes = (count, channels * height, height, width)
    call("variation", images.dtype, (images, gradient, sums, row), *sizes)


def _on_planes(name: str) -> Callable[..., None]:
    def run(images: Tensor, out: Tensor) -> None:
        count, channels, height, width = images.shape
        row = images.new_empty(width + 2)
        call(name, images.dtype, (images, out, row), count * channels, height, width)

    return run


_PIXELS: dict[str, Callable[..., None]] = {
    "view": _view,
    "view_backward": _view_backward,
    "variation": _variation,
    "halved": _on_planes("halved"),
    "add_doubled": _on_planes("add_doubled"),
}

_LIBRARY = torch.library.Library("dfq", "DEF")
"""Keeps what is defined in it for as long as it lives."""


def _defined(name: str) -> torch._ops.OpOverload:
    # Not `custom_op`, whose wrapper takes 7 to 18 microseconds a call, as much as a small layer;
    # this takes 1.5.
    _LIBRARY.define(f"{name}{_SCHEMAS[name]}", tags=torch.Tag.needs_fixed_stride_order)
    _LIBRARY.impl(name, implementation(name), "CPU")
    torch.library.register_fake(f"dfq::{name}", lambda *_: None, lib=_LIBRARY)
    operation: torch._ops.OpOverload = getattr(torch.ops.dfq, name).default
    return operation


OPERATIONS = {name: _defined(name) for name in _SCHEMAS}
"""By the name of the C function, less the type's. Only where `loader.usable` says yes."""

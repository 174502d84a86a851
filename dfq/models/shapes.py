"""What PyTorch's operations will give and take, from what they are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_NEW = {"empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "new_empty"}
_AS_GIVEN = {"_softmax", "_log_softmax", "clone", "cumsum"}
_NORMS = {
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
}


def size_of_new(name: str, args: Sequence[Any]) -> int:
    """How many numbers an operation that makes a tensor of nothing asks for; 0 of others.

    Args:
        name: of the operation, without its overload.
        args: that it is called with.
    """
    if name in _NEW:
        sizes = [part for part in args if isinstance(part, list | tuple)]
        return math.prod(sizes[0]) if sizes else 0
    if name == "arange":
        first, last, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
        return max(0, math.ceil((last - first) / step))
    return 0


def shape_of(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], *, pointwise: bool
) -> list[int] | None:
    """The shape of what an operation gives, of those that detectors are made of; None: of others.

    Args:
        name, args, kwargs: as for `size_of_new`.
        pointwise: whether each of its numbers comes from one place of what it is given.
    """
    first = args[0] if args else None
    if name in ("cat", "stack"):
        along = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return _joined(name, args[0], along)
    if not isinstance(first, Tensor):
        return None
    shape = list(first.shape)
    if name == "convolution":
        weight, transposed, groups = args[1], args[6], args[8]
        channels = weight.shape[1] * groups if transposed else weight.shape[0]
        return [shape[0], channels, *_sides(args)]
    if name in ("mm", "bmm"):
        return [*shape[:-1], args[1].shape[-1]]
    if name.startswith("upsample_") and isinstance(args[1], list | tuple):
        return [*shape[:2], *args[1]]
    if name in ("max_pool2d_with_indices", "avg_pool2d"):
        return _pooled(name, shape, args)
    if name == "constant_pad_nd":
        for place, (low, high) in enumerate(zip(args[1][::2], args[1][1::2], strict=True)):
            shape[-1 - place] = max(0, shape[-1 - place] + low + high)
        return shape
    if name in ("sum", "mean") and len(args) > 1 and isinstance(args[1], list | tuple):
        over = {axis % len(shape) for axis in args[1]}
        keepdim = len(args) > 2 and args[2]
        sides = [1 if axis in over else side for axis, side in enumerate(shape)]
        return [side for axis, side in enumerate(sides) if keepdim or axis not in over]
    if name in _AS_GIVEN or name in _NORMS:
        return shape
    if pointwise:
        tensors = [part for part in args if isinstance(part, Tensor)]
        # Each side is the longest; whether they go together shows when they are computed.
        ndim = max(part.ndim for part in tensors)
        padded = [(1,) * (ndim - part.ndim) + tuple(part.shape) for part in tensors]
        return [0 if 0 in sides else max(sides) for sides in zip(*padded, strict=True)]
    return None


def multiplications(name: str, args: Sequence[Any], shape: list[int] | None) -> int:
    """How many multiplications an operation takes, of those that take most.

    Args:
        name, args: as for `size_of_new`.
        shape: of what it gives.
    """
    if shape is None:
        return 0
    if name == "convolution":
        x, weight, transposed = args[0], args[1], args[6]
        places = x.shape[2:] if transposed else shape[2:]
        return int(x.shape[0] * math.prod(places) * weight.numel())
    if name in ("mm", "bmm"):
        return math.prod(shape) * int(args[0].shape[-1])
    return 0


def _joined(name: str, parts: Sequence[Tensor], along: int) -> list[int] | None:
    shapes = [list(part.shape) for part in parts if isinstance(part, Tensor)]
    if not shapes or any(len(shape) != len(shapes[0]) for shape in shapes):
        return None
    shape = shapes[0]
    if name == "stack":
        shape.insert(along % (len(shape) + 1), len(shapes))
    else:
        shape[along] = sum(sides[along] for sides in shapes)
    return shape


def _sides(convolution: Sequence[Any]) -> list[int]:
    """Height and width of what a convolution of these arguments gives."""
    x, weight, _, stride, padding, dilation, transposed, extra, _ = convolution
    return [
        max(
            0,
            (side - 1) * s - 2 * p + d * (k - 1) + e + 1
            if transposed
            else (side + 2 * p - d * (k - 1) - 1) // s + 1,
        )
        for side, k, s, p, d, e in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, extra, strict=True
        )
    ]


def _pooled(name: str, shape: list[int], args: Sequence[Any]) -> list[int]:
    """`(..., h, w)` to the same, pooled: kernel, stride, padding, then dilation (of a maximum) and
    whether sides are rounded up."""
    kernel = args[1]
    stride = (args[2] if len(args) > 2 else None) or kernel
    padding = args[3] if len(args) > 3 else [0, 0]
    maximum = name.startswith("max")
    dilation = args[4] if maximum and len(args) > 4 else [1, 1]
    place = 5 if maximum else 4
    ceil = bool(args[place]) if len(args) > place else False
    sides = []
    for side, k, s, p, d in zip(
        shape[-2:], *map(_two, (kernel, stride, padding, dilation)), strict=True
    ):
        span = side + 2 * p - d * (k - 1) - 1
        count = (span + (s - 1 if ceil else 0)) // s + 1
        # The last window has to begin in the image or its padding.
        if ceil and (count - 1) * s >= side + p:
            count -= 1
        sides.append(max(0, count))
    return [*shape[:-2], *sides]


def _two(value: Any) -> list[int]:
    parts = list(value) if isinstance(value, list | tuple) else [value]
    return parts * 2 if len(parts) == 1 else parts

"""Building networks within bounds: what a description asks for is counted before it is made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UserError
from ..runtime.limits import MOST_MACS, MOST_MODULES, MOST_VALUES, MOST_WEIGHTS
from .shapes import multiplications, shape_of, size_of_new

_FILLING = {"uniform_", "normal_", "fill_", "zero_"}
_LARGE = 1 << 12


@contextmanager
def bounded(source: str, *, unfilled: bool = False, most: int = MOST_WEIGHTS) -> Iterator[None]:
    """Within this context, networks are built, and tried on an image, that ask for no more than
    `limits` says.

    On the device "meta", where tensors have a shape and no numbers, all of it is found out at once
    and nothing is made.

    Args:
        source: what is built, for messages.
        unfilled: whether large tensors are left as they come, which takes no time: for a network
            that is built to see whether it may be.
        most: numbers in all the tensors that are made.

    Raises:
        UserError: more modules are made than that, a tensor of more numbers, or more numbers in
            all, or computing takes too many multiplications. Raised before memory and time go.
    """
    count = 0

    def count_module(_module: Any, _name: str, _child: Any) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise UserError(f"{source} asks for a network of more than {MOST_MODULES} modules")

    handle = register_module_module_registration_hook(count_module)
    try:
        with _Counting(source, unfilled, min(most, MOST_WEIGHTS)):
            yield
    finally:
        handle.remove()


def most_for(size: int) -> int:
    """How many numbers a network may have made, in tries and for good, whose weights a file of so
    many bytes holds: enough for half precision, and something beside it."""
    return 2 * size + (1 << 24)


class _Counting(TorchDispatchMode):
    """Looks at every operation before it is done."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and keeping the compiler away would load it: seconds.
        return False

    def __init__(self, source: str, unfilled: bool, most: int) -> None:
        super().__init__()
        self.source, self.unfilled, self.most = source, unfilled, most
        self.made = self.multiplied = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        pointwise = torch.Tag.pointwise in func.tags
        shape = shape_of(name, args, kwargs, pointwise=pointwise)
        size = size_of_new(name, args)
        self.made += size
        self.multiplied += multiplications(name, args, shape)
        if max(size, math.prod(shape or ())) > MOST_VALUES or self.made > self.most:
            raise UserError(
                f"{self.source} asks for a network of more than {MOST_VALUES} numbers in a tensor, "
                f"or of more than {self.most} in all"
            )
        if self.multiplied > MOST_MACS:
            raise UserError(
                f"{self.source} asks for a network of more than {MOST_MACS} multiplications"
            )
        if self.unfilled and name in _FILLING and args[0].numel() > _LARGE:
            return args[0]
        known = _on_meta(name, args, kwargs, shape, size)
        return func(*args, **kwargs) if known is None else known


def _on_meta(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], shape: list[int] | None, size: int
) -> Any:
    """What an operation gives where tensors have no numbers, if its shape is known; None: else.

    PyTorch finds shapes by loading half its compiler, which takes seconds.
    """
    if name == "arange":
        if kwargs.get("device") != torch.device("meta"):
            return None
        return torch.empty(size, dtype=kwargs.get("dtype"), device="meta")
    first = args[0] if args else None
    x = first[0] if isinstance(first, list | tuple) and first else first
    if not isinstance(x, Tensor) or not x.is_meta:
        return None
    if name.endswith("_"):
        return x
    if shape is None:
        return None
    if "batch_norm" in name:
        return x.new_empty(shape), x.new_empty(0), x.new_empty(0)
    if name == "max_pool2d_with_indices":
        return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)
    return x.new_empty(shape)

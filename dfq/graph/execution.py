"""Watching a forward pass: hooks that go when it is over, what is called in which order, and passes
that end early."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.base import Model


class StopForward(Exception):
    """Ends a forward pass at the module of interest: what comes after it is not needed."""


@contextlib.contextmanager
def hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes hooks when the context ends.

    Args:
        handles: as `register_forward_hook` and its like return them; an iterable that registers
            them one by one may fail in the middle and leaves none behind.

    Example:
        >>> layer, shapes = nn.Linear(2, 1), []
        >>> with hooks([layer.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))]):
        ...     _ = layer(torch.zeros(3, 2))
        >>> shapes, len(layer._forward_hooks)
        ([torch.Size([3, 1])], 0)
    """
    held: list[RemovableHandle] = []
    try:
        # What was registered before one fails is in it.
        held.extend(handles)
        yield
    finally:
        for handle in held:
            handle.remove()


def blank_images(model: Model, side: int) -> Tensor:
    """One black image, float32 `(1, 3, side, side)`, on the model's device: for passes whose values
    do not matter."""
    return torch.zeros(1, 3, side, side, device=model.device)


def calls_in_order(
    modules: Iterable[tuple[str, nn.Module]], run: Callable[[], object]
) -> Counter[str]:
    """How often each of the modules `(name, module)` is called in `run`, in the order they first
    are; 0 for one that is not."""
    calls: Counter[str] = Counter()
    with hooks(
        module.register_forward_pre_hook(lambda _m, _i, name=name: calls.update([name]))
        for name, module in modules
    ):
        run()
    return calls


def is_inside(name: str, module: str) -> bool:
    """Whether a qualified name is that of a module or of something in it."""
    return f"{name}.".startswith(f"{module}.")


def last_layer_of_block(order: Iterable[str], blocks: Sequence[str]) -> dict[str, str]:
    """The blocks that end with certain layers: the last of those in them.

    Args:
        order: qualified names of the layers, as they run.
        blocks: qualified names.

    Returns:
        Layer -> block.

    Example:
        >>> last_layer_of_block(["0.conv", "1.a", "1.b", "2"], ["0", "1"])
        {'0.conv': '0', '1.b': '1'}
    """
    last = {}
    for layer in order:
        for block in blocks:
            if is_inside(layer, block):
                last[block] = layer
    return {layer: block for block, layer in last.items()}


def last_called_by_end(
    modules: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module], run: Callable[[], object]
) -> tuple[list[str], dict[str, str | None]]:
    """The modules in the order they are first called in `run`; and for each of the blocks, of these
    the last one that had been called when the block's last call ended: what comes first after it
    has no say in what the block gives. None: it ended before any of them was called.

    Args:
        modules, blocks: by name.
    """
    order: dict[str, None] = {}
    ends: dict[str, str | None] = {}

    def after(name: str) -> None:
        # At its last call's place among the ends.
        ends.pop(name, None)
        ends[name] = next(reversed(order), None)

    def watch() -> Iterator[RemovableHandle]:
        for name, module in modules.items():
            yield module.register_forward_pre_hook(lambda _m, _i, name=name: order.setdefault(name))
        for name, block in blocks.items():
            yield block.register_forward_hook(lambda _m, _i, _o, name=name: after(name))

    with hooks(watch()):
        run()
    return list(order), ends

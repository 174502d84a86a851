"""What goes into a block of the quantized and of the float network, and what the float one gives.

Kept on the host in half precision as far as there is room, and computed again beyond it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..graph.execution import StopForward, hooks

ROOM = 2 * 1024**3
"""Bytes of one block's inputs and outputs that are kept, unless told otherwise."""

LARGEST_HALF = 6e4
"""Beyond it, values do not fit into half precision."""


@dataclass(frozen=True)
class Call:
    """One call of a block in a forward pass: `block(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class BlockBatch:
    """A block's part in one batch, call by call.

    Attributes:
        inputs: of the quantized network, whose blocks before this one are quantized.
        float_inputs: of the float network.
        outputs: of the float network, as the block gives them.
    """

    inputs: list[Call]
    float_inputs: list[Call]
    outputs: list[Any]


def watch_calls(
    block: nn.Module,
    calls: int,
    run: Callable[[], object],
    *,
    outputs: bool,
    last: nn.Module | None = None,
) -> tuple[list[Call], list[Any]]:
    """The first `calls` calls of a block in `run`, which ends with the last of them.

    Args:
        block: the module.
        calls: how often it is called in a pass.
        run: the forward pass.
        outputs: whether the block is run in its last call too, for what it gives.
        last: what gives the block's outputs, where the block is the first of several modules that
            run one after another.
    """
    call_inputs: list[Call] = []
    call_outputs: list[Any] = []

    def before(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Copies: what follows may write into them.
        call_inputs.append(Call(_copied(args), _copied(kwargs)))
        if len(call_inputs) == calls and not outputs:
            raise StopForward

    def after(_m: nn.Module, _i: object, output: Any) -> None:
        call_outputs.append(_copied(output))
        if len(call_outputs) == calls:
            raise StopForward

    handles = [block.register_forward_pre_hook(before, with_kwargs=True)]
    if outputs:
        handles.append((last or block).register_forward_hook(after))
    with hooks(handles), contextlib.suppress(StopForward), torch.no_grad():
        run()
    return call_inputs, call_outputs


def _copied(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().clone(), value)


class HostCache:
    """Values by number, kept on the host in half precision while they fit.

    Args:
        compute: gives the value for a number, tensors on the device.
        count: how many there are.
        room: bytes that may be kept.
    """

    def __init__(
        self, compute: Callable[[int], BlockBatch], count: int, *, room: int, device: torch.device
    ) -> None:
        self._compute, self._device = compute, device
        self._kept: list[Any] = [None] * count
        self._left = room

    def get(self, number: int) -> BlockBatch:
        """The value; the first time it is asked for it is computed, and kept if there is room. It
        goes through half precision either way, so that the room changes nothing but the time."""
        stored = self._kept[number]
        if stored is None:
            value = self._compute(number)
            stored = _map_batch(value, _halved)
            size = sum(t.numel() * t.element_size() for t in _tensors(stored))
            if size <= self._left:
                self._left -= size
                self._kept[number] = stored
        return _map_batch(stored, lambda t: _restored(t, self._device))


def _tensors(batch: BlockBatch) -> list[Tensor]:
    calls = [value for call in (*batch.inputs, *batch.float_inputs) for value in _parts(call)]
    return [t for t in tree_leaves([calls, batch.outputs]) if isinstance(t, Tensor)]


def _parts(call: Call) -> tuple[Any, Any]:
    return call.args, call.kwargs


def _map_batch(batch: BlockBatch, function: Callable[[Tensor], Tensor]) -> BlockBatch:
    def mapped(calls: list[Call]) -> list[Call]:
        return [Call(*tree_map_only(Tensor, function, _parts(call))) for call in calls]

    outputs = tree_map_only(Tensor, function, batch.outputs)
    return BlockBatch(mapped(batch.inputs), mapped(batch.float_inputs), outputs)


def _halved(value: Tensor) -> Tensor:
    if value.dtype == torch.float32 and float(value.abs().amax() if value.numel() else 0) < (
        LARGEST_HALF
    ):
        value = value.half()
    return value.cpu()


def _restored(value: Tensor, device: torch.device) -> Tensor:
    value = value.to(device)
    return value.float() if value.dtype == torch.float16 else value

"""Outputs of blocks that will not change any more, kept so that no forward pass runs them again.

Rounding looks at a network once for each of its layers, and from one to the next only a block or
two have changed: without this, most of its time goes into computing the same values over and over.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from ..graph.execution import StopForward, hooks
from ..models.base import Model

ROOM = 2 * 1024**3
"""Bytes that the outputs of one network may take."""


class BlockOutputCache:
    """Keeps the outputs of blocks of a frozen network and answers from memory; a context manager.

    Args:
        module: the network.
        run: the whole forward pass over one batch, by its number; gives the predictions.
        batches: how many batches there are.
        names: qualified names of the blocks, none inside another. Those that do not run exactly
            once in a pass are left as they are.
        room: bytes the outputs may take. Where they take more, those that nothing still to come
            looks at are forgotten; where that is not enough, blocks go on being computed.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Callable[[int], Any],
        batches: int,
        names: Iterable[str],
        *,
        room: int = ROOM,
    ) -> None:
        self._run, self._batches, self._room = run, batches, room
        self._modules = {name: module.get_submodule(name) for name in names}
        self._kept: dict[str, list[Any]] = {}
        self._batch = 0
        calls, self._overwritten = self._look()
        self._modules = {name: m for name, m in self._modules.items() if calls[name] == 1}

    def _look(self) -> tuple[Counter[str], frozenset[str]]:
        """How often each block runs in a pass, and those whose output is written into by what comes
        after."""
        calls: Counter[str] = Counter()
        versions: list[tuple[str, Tensor, int]] = []

        def after(name: str, output: Any) -> None:
            calls.update([name])
            leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            versions.extend((name, leaf, leaf._version) for leaf in leaves)

        def watch() -> Iterator[RemovableHandle]:
            for name, block in self._modules.items():
                yield block.register_forward_hook(lambda _m, _i, out, name=name: after(name, out))

        with hooks(watch()):
            self.run(0)
        # A view has the version of what it is of.
        return calls, frozenset(name for name, leaf, then in versions if leaf._version != then)

    @classmethod
    def of(
        cls,
        detector: Model,
        batches: Sequence[Tensor],
        names: Iterable[str],
        *,
        room: int = ROOM,
    ) -> BlockOutputCache:
        """Those of a detector, over batches of images `(n, 3, h, w)` in [0, 1]."""
        return cls(
            detector.module, lambda i: detector.raw(batches[i]), len(batches), names, room=room
        )

    def run(self, batch: int) -> Any:
        """The forward pass over batch number `batch`, finished blocks answering from memory."""
        self.select(batch)
        return self._run(batch)

    def select(self, batch: int) -> None:
        """From now on finished blocks answer for batch number `batch`."""
        self._batch = batch

    def __enter__(self) -> BlockOutputCache:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._kept):
            self._recall(name)

    def finish(self, name: str) -> None:
        """Block `name` and all it depends on stay as they are from now on."""
        if name not in self._modules or name in self._kept:
            return
        block = self._modules[name]
        outputs: list[Any] = []

        def after(_m: nn.Module, _i: object, output: Any) -> None:
            outputs.append(output)
            raise StopForward

        with hooks([block.register_forward_hook(after)]):
            for batch in range(self._batches):
                with contextlib.suppress(StopForward):
                    self.run(batch)
        self._kept[name] = outputs
        copied = name in self._overwritten

        def answer(*_args: object, **_kwargs: object) -> Any:
            output = self._kept[name][self._batch]
            # Copies of all that is kept would take a third of the time.
            return tree_map_only(Tensor, torch.clone, output) if copied else output

        # Instead of the class's own; its hooks go on being called.
        block.forward = answer
        if self._bytes() > self._room:
            self._make_room()
        if self._bytes() > self._room:
            self._recall(name)

    def _recall(self, name: str) -> None:
        """Let a block compute its output again."""
        del self._modules[name].forward
        del self._kept[name]

    def _bytes(self) -> int:
        tensors = (leaf for outputs in self._kept.values() for leaf in tree_leaves(outputs))
        return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))

    def _make_room(self) -> None:
        """Forget outputs that the predictions no longer depend on: finished blocks after them
        answer without looking at theirs."""
        expected = tree_leaves(self.run(0))
        generator = torch.Generator().manual_seed(0)

        def perturbed(value: Tensor) -> Tensor:
            noise = torch.rand(2, *value.shape, generator=generator).to(value)
            return value * noise[0] + noise[1]

        for name, outputs in self._kept.items():
            if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(outputs)):
                continue
            first, outputs[0] = outputs[0], tree_map_only(Tensor, perturbed, outputs[0])
            predictions = tree_leaves(self.run(0))
            outputs[0] = first
            if len(predictions) == len(expected) and all(map(_same, predictions, expected)):
                # Of the same shape, and no size.
                self._kept[name] = [
                    tree_map_only(Tensor, lambda t: t.new_zeros(()).expand_as(t), batch)
                    for batch in outputs
                ]


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)

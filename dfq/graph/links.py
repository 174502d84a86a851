"""Which layer reads what another gives, with nothing but a rectifier between, found by watching one
forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..models.base import Model
from .execution import blank_images, hooks
from .fold_batchnorm import FoldedBatchNorm
from .tracing import name_of

Slopes = tuple[float, ...]
"""Of the rectifiers a value went through, one after the other: what each multiplies by below zero:
0 for ReLU."""

OTHER = ""
"""A consumer that is no layer of weights, or what the network gives."""


@dataclass
class Link:
    """What is known of a layer of weights.

    Attributes:
        sources: the layers that gave its inputs, and through which rectifiers: one for all calls
            where it is a link to count on. None: something else did.
        consumers: names of the layers that read its outputs, rectified or not; `OTHER` among them
            where something else does.
        batchnorm: the folded BatchNorm that its outputs went through, in all calls or none.
    """

    sources: set[tuple[str, Slopes] | None] = field(default_factory=set)
    consumers: set[str] = field(default_factory=set)
    batchnorm: FoldedBatchNorm | None = None

    @property
    def source(self) -> tuple[str, Slopes] | None:
        """The one layer whose outputs it reads, and through which rectifiers; None: not only one.

        A set of one element in all the calls, so both are the same in all of them.
        """
        return next(iter(self.sources)) if len(self.sources) == 1 else None


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes PyTorch's own convolution or linear map of its own weight."""
    return (
        isinstance(layer, nn.Conv2d | nn.Linear)
        and type(layer).forward in (nn.Conv2d.forward, nn.Linear.forward)
        and "weight" in layer._parameters
    )


class _Flow(TorchFunctionMode):
    """Follows what plain layers give through rectifiers to what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: dict[str, Link] = {}
        self.inside = False
        # By id; kept alive, as ids are used again.
        self._origins: dict[int, tuple[Tensor, str, Slopes]] = {}

    def give(self, tensor: Tensor, layer: str, slopes: Slopes = ()) -> None:
        """`tensor` is what `layer` gave, through rectifiers."""
        self._origins[id(tensor)] = (tensor, layer, slopes)

    def of(self, tensor: Any) -> tuple[str, Slopes] | None:
        """Which layer gave a tensor, and through which rectifiers."""
        return self._origins[id(tensor)][1:] if id(tensor) in self._origins else None

    def read(self, value: Any, consumer: str) -> None:
        """Note who reads a value, or all that it holds."""
        for tensor in _tensors(value, set()):
            known = self.of(tensor)
            if known is not None:
                self.links[known[0]].consumers.add(consumer)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        known = self.of(args[0]) if args and not self.inside else None
        name = name_of(func)
        result = func(*args, **kwargs)
        if self.inside:
            return result
        slope = _slope(name, args, kwargs)
        if known is not None and slope is not None:
            self.give(result, known[0], (*known[1], slope))
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            # Asking for a shape gives no tensor, and is no use of the values.
            self.read((args, kwargs), OTHER)
            for leaf in tree_leaves(result):
                # What was written into is no longer what a layer gave.
                self._origins.pop(id(leaf), None)
        return result


def _slope(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """By what a function multiplies below zero; None: it is no rectifier."""
    if name == "relu":
        return 0.0
    if name == "leaky_relu":
        return float(kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01))
    return None


def _tensors(value: Any, visited: set[int]) -> Iterator[Tensor]:
    """All tensors that a structure or the attributes of an object hold; not a network's own."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, nn.Module | Model) or id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, visited)


@torch.no_grad()
def links(model: Model) -> dict[str, Link]:
    """What each plain layer of a network reads, and what reads it, by name.

    Args:
        model: BatchNorm folded, in eval mode. What its last layers give counts as read by something
            else, and so does all that its raw predictions hold.
    """
    flow, module = _Flow(), model.module
    last = model.boundary_layers().last
    parameters: dict[int, str] = {}

    def before(name: str, args: Any, kwargs: Any) -> None:
        flow.inside = True
        flow.read((args, kwargs), name)
        flow.links[name].sources.add(flow.of(tree_leaves((args, kwargs))[0]))

    def after(name: str, output: Tensor) -> None:
        flow.inside = False
        flow.give(output, name)

    def normed(layer: FoldedBatchNorm, inputs: Any) -> None:
        known = flow.of(inputs[0])
        if known is not None and not known[1]:
            flow.links[known[0]].batchnorm = layer

    def watch() -> Iterator[RemovableHandle]:
        for name, child in module.named_modules():
            if isinstance(child, FoldedBatchNorm):
                yield child.register_forward_pre_hook(normed)
            elif is_plain(child):
                flow.links[name] = Link(consumers={OTHER} if name in last else set())
                # Layers that hold one weight are not to be changed one by one.
                first = parameters.setdefault(id(child.weight), name)
                if first != name:
                    flow.links[first].consumers.add(OTHER)
                    flow.links[name].consumers.add(OTHER)
                    flow.links[first].sources.add(None)
                    flow.links[name].sources.add(None)
                yield child.register_forward_pre_hook(
                    lambda _m, args, kwargs, name=name: before(name, args, kwargs),
                    with_kwargs=True,
                )
                yield child.register_forward_hook(
                    lambda _m, _i, output, name=name: after(name, output)
                )

    with hooks(watch()):
        images = blank_images(model, model.stride * 2)
        with flow:
            raw: object = model.raw(images)
        flow.read(raw, OTHER)
    return flow.links

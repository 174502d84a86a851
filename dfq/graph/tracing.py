"""Where a network adds and concatenates activations, found by watching one forward pass.

Tensors are followed from the layers that compute them, through all functions, to the sums and
concatenations that they enter, so a family need not describe its blocks. Functions after the layers
of the predictions (decoding, anchors) are not recorded, nor are those outside of all modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..models.base import Model
from ..models.nn.matmul import Matmul
from .execution import blank_images, hooks
from .outline import WEIGHTED

CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
SUMS = frozenset({"add"})
AVERAGES = frozenset({"avg_pool2d", "adaptive_avg_pool2d", "interpolate"})
"""Give values between those that they are given (`interpolate` where it gives others at all)."""

# Every value of what they give is one of what they are given, or zero: a tensor on a grid stays on
# it. (Names as `torch.overrides` gives them.)
_KEEPING = {
    *("__getitem__", "chunk", "clone", "contiguous", "detach", "dropout", "expand", "flatten"),
    *("float", "index_select", "max_pool2d", "narrow", "permute", "repeat", "reshape", "roll"),
    *("select", "split", "squeeze", "to", "transpose", "unbind", "unflatten", "unsqueeze"),
    *("view", "view_as"),
}


def name_of(function: Any) -> str:
    """A function's name, the same for the one that writes into its first operand."""
    name: str = function.__name__
    return name if name.endswith("__") else name.removesuffix("_")


class Key(NamedTuple):
    """Which result of a network: that of the `number`th call of the function called `function`
    that one forward pass of the module `owner` makes itself."""

    owner: str
    function: str
    number: int


@dataclass(eq=False)
class Value:
    """What a layer or a function gave, wherever it then went unchanged.

    Attributes:
        layer: name of the layer; None: it is no layer's output.
        call: number of the function's call in the trace; None for layers, and outside of modules.
        function: its name; empty for layers.
        live: whether it depends on outputs of quantized layers alone, by any functions.
        predicted: whether it comes from the layers that give the predictions.
        operands: of a sum, a concatenation or an average of activations; empty for all others.
        consumers: names of the functions that read it.
        sources: what a function was given of layers' or functions'; empty for layers.
    """

    layer: str | None
    call: int | None
    live: bool
    predicted: bool
    operands: tuple[Value, ...] = ()
    function: str = ""
    consumers: set[str] = field(default_factory=set)
    sources: tuple[Value, ...] = ()

    @property
    def consumer(self) -> str | None:
        """The only function that reads it; None where there are several."""
        return next(iter(self.consumers)) if len(self.consumers) == 1 else None


class _Frame(NamedTuple):
    """One call of a module."""

    number: int
    module: nn.Module


class _Activation(NamedTuple):
    """A value as one tensor has it: all of it, or its positive part after a ReLU."""

    value: Value
    rectified: bool


class Trace(TorchFunctionMode):
    """Watches a forward pass; see `trace`.

    Args:
        module: the network.
        quantized: names of the layers that count.
        last: names of the layers that give the predictions.

    Attributes:
        values: in the order they were computed.
        inputs: by name of a layer, what each of its calls was given; None: nothing of a layer's.
        products: by name of a product of activations, the left operand of each of its calls.
        silus: by a module and an `nn.SiLU` in it, what each of its calls there was given.
    """

    def __init__(self, module: nn.Module, quantized: Container[str], last: Container[str]) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.inputs: dict[str, list[Value | None]] = {}
        self.products: dict[str, list[Value | None]] = {}
        self.silus: dict[tuple[nn.Module, nn.Module], list[Value | None]] = {}
        self._quantized, self._last = quantized, last
        self._names = {id(child): name for name, child in module.named_modules()}
        self._calls: list[tuple[str, tuple[_Frame, ...]]] = []
        self._stack: list[_Frame] = []
        self._runs: Counter[int] = Counter()
        self._activations: dict[int, _Activation] = {}
        # id() alone would be reused once a tensor is freed.
        self._alive: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        call = None
        if self._stack:
            call = len(self._calls)
            self._calls.append((name, tuple(self._stack)))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Before the call, which may write into what it is given.
        known = [
            self._activations[id(tensor)] for tensor in tensors if id(tensor) in self._activations
        ]
        if name == "silu" and len(self._stack) > 1 and type(self._stack[-1].module) is nn.SiLU:
            pair = (self._stack[-2].module, self._stack[-1].module)
            self.silus.setdefault(pair, []).append(known[0].value if known else None)
        result = func(*args, **kwargs)
        outputs = _floats(result)
        if not outputs or not known:
            return result
        if _keeps(name, args, kwargs):
            self._note(outputs, known[0])
            return result
        for activation in known:
            if not activation.rectified:
                activation.value.consumers.add(name)
        if name == "relu":
            self._note(outputs, _Activation(known[0].value, True))
        else:
            values = [activation.value for activation in known]
            live = all(value.live for value in values)
            predicted = any(value.predicted for value in values)
            combines = (
                call is not None and len(known) == len(tensors) and _adds_or_concats(name, tensors)
            )
            operands = tuple(values) if combines and live and not predicted else ()
            value = Value(None, call, live, predicted, operands, name, sources=tuple(values))
            self._add(outputs, value)
        return result

    def _add(self, tensors: Iterable[Tensor], value: Value) -> None:
        self.values.append(value)
        self._note(tensors, _Activation(value, False))

    def _note(self, tensors: Iterable[Tensor], activation: _Activation) -> None:
        for tensor in tensors:
            self._alive.append(tensor)
            self._activations[id(tensor)] = activation

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before every module's forward pass."""
        self._stack.append(_Frame(self._runs.total(), module))
        self._runs[id(module)] += 1
        if isinstance(module, (*WEIGHTED, Matmul)):
            activation = self._activations.get(id(tree_leaves((args, kwargs))[0]))
            inputs_by_layer = self.products if isinstance(module, Matmul) else self.inputs
            calls = inputs_by_layer.setdefault(self._names[id(module)], [])
            calls.append(activation.value if activation else None)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After every module's forward pass."""
        self._stack.pop()
        if isinstance(module, WEIGHTED):
            name = self._names[id(module)]
            value = Value(name, None, name in self._quantized, name in self._last)
            self._add(_floats(output), value)

    def softmax_products(self) -> frozenset[str]:
        """Names of the products of activations whose left operand is a softmax in each call."""
        return frozenset(
            name
            for name, lefts in self.products.items()
            if all(left is not None and left.function == "softmax" for left in lefts)
        )

    def adds_and_concats(self) -> list[Value]:
        """The sums, concatenations and averages of what quantized layers compute, within some
        module."""
        return [value for value in self.values if value.operands and self.owner_of(value)]

    def owner_of(self, value: Value) -> nn.Module | None:
        """The innermost module whose own doing a value is; None where there is none.

        An activation function is no such module: families share one among all their blocks, and
        Ultralytics even among all networks. Its results are those of the block that called it.
        """
        if value.call is None:
            return None
        frame = self._owner(self._calls[value.call][1])
        return frame.module if frame else None

    def _owner(self, stack: Sequence[_Frame]) -> _Frame | None:
        return next((frame for frame in reversed(stack) if self._owns(frame.module)), None)

    def _owns(self, module: nn.Module) -> bool:
        if any(module.children()):
            return True
        return self._runs[id(module)] == 1 and not type(module).__module__.startswith("torch.nn.")

    def keys(self, values: Sequence[Value]) -> list[Key]:
        """The key of each of `values`, which all have owners: one for all calls of a module."""
        key_of_call: list[Key | None] = []
        counts: Counter[tuple[int, str]] = Counter()
        for function, stack in self._calls:
            frame = self._owner(stack)
            key_of_call.append(None)
            if frame is not None:
                number = counts[frame.number, function]
                key_of_call[-1] = Key(self._names[id(frame.module)], function, number)
                counts[frame.number, function] += 1
        keys = (key_of_call[value.call] for value in values if value.call is not None)
        return [key for key in keys if key is not None]

    def bystanders(self, values: Sequence[Value]) -> list[nn.Module]:
        """Modules within the owners of `values` that call the same functions themselves."""
        functions: dict[int, set[str]] = {}
        for value in values:
            if value.call is not None:
                owner = id(self.owner_of(value))
                functions.setdefault(owner, set()).add(self._calls[value.call][0])
        modules: dict[nn.Module, None] = {}
        for function, stack in self._calls:
            frame = self._owner(stack)
            inside = any(function in functions.get(id(caller.module), ()) for caller in stack)
            if frame is not None and inside and id(frame.module) not in functions:
                modules[frame.module] = None
        return list(modules)

    def follow(self, tensor: Tensor, output: Tensor) -> None:
        """`output` is `tensor` for all that comes."""
        activation = self._activations.get(id(tensor))
        if activation is not None:
            self._note([output], activation)


def _floats(result: Any) -> list[Tensor]:
    leaves = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def _adds_or_concats(name: str, tensors: Sequence[Tensor]) -> bool:
    """Whether a function of these tensors, all of them of layers, is a sum or a concatenation of
    feature maps or rows of tokens, or averages one feature map."""
    if len(tensors) == 1:
        return name in AVERAGES and tensors[0].ndim == 4
    if any(tensor.ndim < 3 for tensor in tensors):
        return False
    return name in CONCATENATIONS or (name in SUMS and len(tensors) == 2)


def _keeps(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if name == "interpolate":
        return kwargs.get("mode", args[3] if len(args) > 3 else "nearest").startswith("nearest")
    if name == "pad":
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
        return mode != "constant" or not value
    if name in SUMS:
        # Blocks that have lost a branch add 0 in its place.
        return len(args) == 2 and isinstance(args[1], int | float) and args[1] == 0
    return name in _KEEPING


def trace(
    detector: Model,
    quantized: Container[str],
    *,
    through: Callable[[nn.Module], bool] = lambda _: False,
) -> Trace:
    """Watch a forward pass of a detector.

    Args:
        detector: BatchNorm folded.
        quantized: names of the layers that count.
        through: modules whose output is their input for this purpose: quantizers that are there.
    """
    module = detector.module
    recording = Trace(module, quantized, frozenset(detector.boundary_layers().last))

    def before(child: nn.Module, args: Any, kwargs: Any) -> None:
        recording.enter(child, args, kwargs)

    def after(child: nn.Module, args: Any, output: Any) -> None:
        recording.leave(child, args, output)
        if through(child):
            recording.follow(args[0], output)

    def watch() -> Iterator[RemovableHandle]:
        for child in module.modules():
            yield child.register_forward_pre_hook(before, with_kwargs=True)
            yield child.register_forward_hook(after)

    with hooks(watch()), torch.no_grad():
        images = blank_images(detector, detector.stride * 2)
        with recording:
            detector.raw(images)
    return recording

"""What BatchNorm says of the values that activations take.

A channel behind a BatchNorm has, over the training data, mean beta and standard deviation gamma:
the range of its values follows from the network itself, without images. Ranges are propagated
through activation functions, sums, concatenations and pooling.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..graph.execution import hooks
from ..graph.fold_batchnorm import FoldedBatchNorm
from ..graph.outline import WEIGHTED
from ..models.base import Model
from .output_quantizers import output_quantizers
from .traversal import activation_quantizers, float_mode

STEPS = 13
"""Values of a channel that are followed, evenly from one end to the other: a function's least value
may lie in between, as SiLU's does."""

_PRODUCTS = frozenset(
    {
        *("conv2d", "linear", "matmul", "__matmul__", "bmm", "einsum", "addmm"),
        *("layer_norm", "group_norm"),
    }
)


class _Unknown(TorchFunctionMode):
    """Follows which tensors depend on a layer that no BatchNorm follows, by any functions."""

    def __init__(self) -> None:
        super().__init__()
        self._unknown: dict[int, bool] = {}
        # As long as they are alive, no two have one id.
        self._alive: list[Tensor] = []

    def note(self, result: Any, unknown: bool) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._alive.append(leaf)
                self._unknown[id(leaf)] = unknown

    def among(self, tensors: Any) -> bool:
        return any(self._unknown.get(id(leaf), False) for leaf in tree_leaves(tensors))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        unknown = self.among((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self.note(result, unknown or getattr(func, "__name__", "") in _PRODUCTS)
        return result


@torch.no_grad()
def implied_ranges(detector: Model, deviations: float) -> dict[str, tuple[float, float]]:
    """Least and largest value that reach each quantizer of activations, where each channel of each
    BatchNorm takes values within some standard deviations of its mean.

    Args:
        detector: with quantizers inserted; BatchNorm folded or not.
        deviations: how many.

    Returns:
        Name, as `activation_quantizers` gives it -> least and largest value; without those that are
        given anything that comes from a layer without BatchNorm. What a layer gives to BatchNorm
        alone, folded into the layer, takes BatchNorm's values.
    """
    watch = _Unknown()
    ranges: dict[str, tuple[float, float]] = {}
    strange: set[str] = set()
    before_batchnorm: dict[int, str] = {}
    offsets = torch.linspace(-deviations, deviations, STEPS, device=detector.device)

    def extend(name: str, values: Tensor) -> None:
        low, high = (float(v) for v in values.aminmax())
        before = ranges.get(name, (low, high))
        ranges[name] = (min(low, before[0]), max(high, before[1]))

    def follow(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if len(output) != STEPS or (isinstance(layer, _BatchNorm) and layer.running_var is None):
            # Of a part of an image, and not of the image.
            watch.note(output, True)
            return None
        if isinstance(layer, FoldedBatchNorm):
            mean, spread = layer.shift, layer.factor.abs() * layer.var.sqrt()
        else:
            assert isinstance(layer, _BatchNorm)
            assert layer.running_var is not None
            mean = output.new_zeros(output.shape[1]) if layer.bias is None else layer.bias
            spread = (layer.running_var / (layer.running_var + layer.eps)).sqrt()
            spread = spread if layer.weight is None else spread * layer.weight.abs()
        values = mean + offsets[:, None] * spread
        values = values.view(*values.shape, *[1] * (output.ndim - 2)).expand_as(output).clone()
        watch.note(values, False)
        if isinstance(layer, FoldedBatchNorm) and id(inputs[0]) in before_batchnorm:
            extend(before_batchnorm.pop(id(inputs[0])), values)
        return values

    of_outputs = {name for name, _ in output_quantizers(detector.module)}

    def see(name: str, inputs: tuple[Tensor, ...]) -> None:
        if not watch.among(inputs):
            extend(name, inputs[0])
        elif name in of_outputs:
            # BatchNorm may come right behind; noted, it is kept alive.
            watch.note(inputs, True)
            before_batchnorm[id(inputs[0])] = name
        else:
            strange.add(name)

    def watched() -> Iterator[RemovableHandle]:
        for child in detector.module.modules():
            if isinstance(child, (FoldedBatchNorm, _BatchNorm)):
                yield child.register_forward_hook(follow)
            elif isinstance(child, WEIGHTED):
                yield child.register_forward_hook(lambda _m, _i, output: watch.note(output, True))
        for name, quantizer in activation_quantizers(detector.module):
            yield quantizer.register_forward_pre_hook(
                lambda _q, inputs, name=name: see(name, inputs)
            )

    side = detector.stride * 2
    images = torch.linspace(0, 1, STEPS, device=detector.device)[:, None, None, None]
    with hooks(watched()), float_mode(detector.module), watch:
        detector.raw(images.expand(STEPS, 3, side, side).clone())
    strange.update(before_batchnorm.values())
    return {name: ends for name, ends in ranges.items() if name not in strange}

"""Fold BatchNorm into the convolution before it, so that what is trained is what is shipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..models.base import AnyModel
from .execution import blank_images, hooks


class _Readers(TorchFunctionMode):
    """Counts, by `id`, the operations that read each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Asking for a shape or a device gives no tensor, and is no use of the values.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            leaves = tree_leaves((args, kwargs))
            self.count.update({id(leaf) for leaf in leaves if isinstance(leaf, Tensor)})
        return result


def _pairs(module: nn.Module, run: Callable[[], object]) -> list[tuple[str, str]]:
    """Names of (convolution, BatchNorm) where the one's output goes into the other alone.

    Found by watching one forward pass, not by names: no family has to say how it builds its blocks.
    """
    # id() alone would be reused once a tensor is freed, so the outputs are kept alive.
    produced: dict[int, tuple[str, Tensor]] = {}
    norm_of: dict[int, str] = {}
    stray: set[str] = set()
    readers = _Readers()

    def watch() -> Iterator[RemovableHandle]:
        for name, child in module.named_modules():
            if isinstance(child, nn.Conv2d):

                def after(_m: nn.Module, _i: object, output: Tensor, name: str = name) -> None:
                    produced[id(output)] = (name, output)
                    readers.count[id(output)] = 0

                yield child.register_forward_hook(after)
            elif isinstance(child, _BatchNorm):

                def before(_m: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                    if id(inputs[0]) in produced:
                        norm_of[id(inputs[0])] = name
                    else:
                        stray.add(name)

                yield child.register_forward_pre_hook(before)

    with hooks(watch()), torch.no_grad(), readers:
        run()
    # A layer that has, in one of its calls, a different partner or another reader beside it
    # cannot be folded into one weight.
    pairs: dict[tuple[str, str], None] = {}
    for key, (conv, _) in produced.items():
        alone = readers.count[key] == 1 and key in norm_of and norm_of[key] not in stray
        pairs[conv, norm_of[key] if alone else ""] = None
    convs, norms = Counter(c for c, _ in pairs), Counter(b for _, b in pairs)
    return [(c, b) for c, b in pairs if b and convs[c] == norms[b] == 1]


class FoldedBatchNorm(nn.Identity):
    """Stands where a folded BatchNorm was, and remembers what it knew.

    Its input y is what the BatchNorm gave: y = factor * (x - mean) + shift, with x the output of
    the convolution before folding.

    Attributes:
        mean, var: running statistics of x, `(channels,)`.
        factor: gamma / sqrt(var + eps), `(channels,)`.
        shift: beta, `(channels,)`.
        eps: what was added to the variance.
    """

    mean: Tensor
    var: Tensor
    factor: Tensor
    shift: Tensor

    def __init__(
        self, mean: Tensor, var: Tensor, factor: Tensor, shift: Tensor, eps: float
    ) -> None:
        super().__init__()
        self.eps = eps
        # Buffers follow the module to its device; not persistent, so that state dicts of folded
        # networks hold weights only.
        for name, value in (("mean", mean), ("var", var), ("factor", factor), ("shift", shift)):
            self.register_buffer(name, value.clone(), persistent=False)


@torch.no_grad()
def fold_batchnorm(module: nn.Module, run: Callable[[], object]) -> list[str]:
    """Fold every BatchNorm that alone takes what a convolution gives, in place.

    w' = w * gamma / sqrt(var + eps),  b' = (b - mean) * gamma / sqrt(var + eps) + beta.

    Args:
        module: the network, in eval mode.
        run: runs one forward pass of it on any input.

    Returns:
        Names of the BatchNorm modules that were replaced, by `FoldedBatchNorm`.
    """
    folded = []
    for conv_name, bn_name in _pairs(module, run):
        conv, bn = module.get_submodule(conv_name), module.get_submodule(bn_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(bn, _BatchNorm)
        if bn.running_mean is None or bn.running_var is None:
            continue
        factor = torch.rsqrt(bn.running_var + bn.eps)
        shift = torch.zeros_like(factor)
        if bn.affine:
            factor, shift = factor * bn.weight, bn.bias
        bias = torch.zeros_like(factor) if conv.bias is None else conv.bias
        bias = (bias - bn.running_mean) * factor + shift
        requires_grad = conv.weight.requires_grad
        conv.weight = nn.Parameter(conv.weight * factor[:, None, None, None], requires_grad)
        conv.bias = nn.Parameter(bias, requires_grad)
        parent, _, leaf = bn_name.rpartition(".")
        folded_bn = FoldedBatchNorm(bn.running_mean, bn.running_var, factor, shift, bn.eps)
        setattr(module.get_submodule(parent), leaf, folded_bn.train(bn.training))
        folded.append(bn_name)
    return folded


def fold(detector: AnyModel) -> AnyModel:
    """Fold the BatchNorm layers of `detector` in place; returns it."""
    image = blank_images(detector, detector.stride * 2)
    fold_batchnorm(detector.module, lambda: detector.raw(image))
    return detector

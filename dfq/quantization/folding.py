"""Fold BatchNorm into the convolution before it, so that what is trained is what is shipped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def _pairs(module: nn.Module, run: Callable[[], object]) -> list[tuple[str, str]]:
    """Names of (convolution, BatchNorm) where the one's output is the other's input.

    Found by watching one forward pass, not by names: no family has to say how it builds its blocks.
    """
    # id() alone would be reused once a tensor is freed, so the outputs are kept alive.
    produced: dict[int, tuple[str, Tensor]] = {}
    found: list[tuple[str, str]] = []
    handles = []
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d):

            def after(_m: nn.Module, _i: object, output: Tensor, name: str = name) -> None:
                produced[id(output)] = (name, output)

            handles.append(child.register_forward_hook(after))
        elif isinstance(child, _BatchNorm):

            def before(_m: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if id(inputs[0]) in produced:
                    found.append((produced[id(inputs[0])][0], name))

            handles.append(child.register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    # A layer called twice with different partners cannot be folded into one weight.
    once = {conv: bn for conv, bn in found}
    return [(c, b) for c, b in once.items() if all(x == c or y != b for x, y in found)]


@torch.no_grad()
def fold_batchnorm(module: nn.Module, run: Callable[[], object]) -> list[str]:
    """Fold every BatchNorm that directly follows a convolution, in place.

    w' = w * gamma / sqrt(var + eps),  b' = (b - mean) * gamma / sqrt(var + eps) + beta.

    Args:
        module: the network, in eval mode.
        run: runs one forward pass of it on any input.

    Returns:
        Names of the BatchNorm modules that were replaced by the identity.
    """
    folded = []
    for conv_name, bn_name in _pairs(module, run):
        conv, bn = module.get_submodule(conv_name), module.get_submodule(bn_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(bn, _BatchNorm)
        if bn.running_mean is None or bn.running_var is None:
            continue
        factor = torch.rsqrt(bn.running_var + bn.eps)
        if bn.affine:
            factor = factor * bn.weight
        bias = torch.zeros_like(bn.running_mean) if conv.bias is None else conv.bias
        bias = (bias - bn.running_mean) * factor
        if bn.affine:
            bias = bias + bn.bias
        requires_grad = conv.weight.requires_grad
        conv.weight = nn.Parameter(conv.weight * factor[:, None, None, None], requires_grad)
        conv.bias = nn.Parameter(bias, requires_grad)
        parent, _, leaf = bn_name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Identity())
        folded.append(bn_name)
    return folded

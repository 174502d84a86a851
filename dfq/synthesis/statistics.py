"""The BatchNorm-statistics loss: make a batch look, to every BatchNorm, like the training data.

    L_bn = sum_l ||mu_l(x) - mu_l||_2 + ||var_l(x) - var_l||_2

with mu_l, var_l the running statistics stored in layer l and mu_l(x), var_l(x) those of the batch
at its input (DeepInversion, Yin et al. 2020; the first layer also has a weight of its own).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from ..quantization.folding import FoldedBatchNorm


class _Moments(torch.autograd.Function):
    """Identity on x that also returns the per-channel mean and biased variance.

    With one backward pass for all three outputs, the statistics' gradient a*x + b joins the
    gradient that comes from the network in a single fused pass instead of four.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = x.float()
        dims = (0, *range(2, x.ndim))
        count = x.numel() // x.shape[1]
        mean = values.sum(dims) / count
        var = (values * values).sum(dims) / count - mean * mean
        ctx.save_for_backward(x, mean)
        ctx.count = count
        return x.view_as(x), mean, var.clamp_min_(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        shape = (1, -1, *([1] * (x.ndim - 2)))
        slope = (2.0 / ctx.count) * grad_var
        offset = grad_mean / ctx.count - slope * mean
        result = torch.addcmul(grad, x, slope.view(shape).to(x.dtype))
        return result.add_(offset.view(shape).to(x.dtype))


def _differences(
    layer: _BatchNorm | FoldedBatchNorm, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    """mu(x) - mu_l and var(x) - var_l of the layer whose input has `mean` and `var`."""
    if isinstance(layer, FoldedBatchNorm):
        # y = factor * (x - mean_l) + shift. A channel whose gamma has died says nothing about x.
        alive = layer.factor.abs() > 1e-3 * layer.factor.abs().median()
        inverse = torch.where(alive, 1 / layer.factor, 0.0)
        return (mean - layer.shift) * inverse, var * inverse.square() - layer.var * alive
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return mean - layer.running_mean, var - layer.running_var


class BatchNormStatistics:
    """Watches the inputs of every BatchNorm of a frozen network; a context manager.

    A folded BatchNorm counts like any other: the statistics of what went into it follow from those
    of what the folded convolution gives, and a network without BatchNorm layers runs faster.

    Args:
        module: the network, in eval mode.

    Raises:
        UserError: if it holds no BatchNorm with running statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers: dict[str, _BatchNorm | FoldedBatchNorm] = {
            name: child
            for name, child in module.named_modules()
            if isinstance(child, FoldedBatchNorm)
            or (isinstance(child, _BatchNorm) and child.running_mean is not None)
        }
        if not self.layers:
            raise UserError(
                "the model has no BatchNorm statistics to match: it has no BatchNorm layer, or "
                "they were fused away; use an unfused checkpoint, or --set synthesis.weights.bn=0 "
                "--set synthesis.weights.first_bn=0"
            )
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> BatchNormStatistics:
        for name, layer in self.layers.items():

            def tap(_m: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> tuple[Tensor]:
                x, mean, var = _Moments.apply(inputs[0])
                self._seen[name] = (mean, var)
                return (x,)

            self._handles.append(layer.register_forward_pre_hook(tap))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def distances(self, *, relative: bool = False) -> list[Tensor]:
        """Of the last forward pass: ||mu - mu_l||_2 + ||var - var_l||_2 of each layer, in the
        order the layers ran.

        Args:
            relative: in units of each channel's own standard deviation and variance, root mean
                square over the channels, so that no layer counts for more because its values are
                larger or its channels more.
        """
        result = []
        for name, (mean, var) in self._seen.items():
            layer = self.layers[name]
            to_mean, to_var = _differences(layer, mean, var)
            if relative:
                stored = layer.var if isinstance(layer, FoldedBatchNorm) else layer.running_var
                assert stored is not None
                spread = stored + 1e-5
                root = math.sqrt(len(spread))
                to_mean, to_var = to_mean * spread.rsqrt() / root, to_var / spread / root
            result.append(torch.linalg.vector_norm(to_mean) + torch.linalg.vector_norm(to_var))
        self._seen.clear()
        return result

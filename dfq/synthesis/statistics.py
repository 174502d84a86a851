"""The BatchNorm-statistics loss: make a batch look, to every BatchNorm, like the training data.

    L_bn = sum_l ||mu_l(x) - mu_l||_2 + ||var_l(x) - var_l||_2

with mu_l, var_l the running statistics stored in layer l and mu_l(x), var_l(x) those of the batch
at its input (DeepInversion, Yin et al. 2020; the first layer also has a weight of its own).
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
        # The kernel BatchNorm itself uses: one pass, in float32 whatever the dtype of x.
        unused = torch.zeros(x.shape[1], device=x.device)
        mean, var = torch.ops.aten.batch_norm_update_stats(x, unused, unused.clone(), 0.0)
        ctx.save_for_backward(x, mean)
        ctx.count = x.numel() // x.shape[1]
        return x.view_as(x), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        slope = (2.0 / ctx.count) * grad_var
        offset = grad_mean / ctx.count - slope * mean
        # slope * x + offset by the kernel of a BatchNorm in eval mode: it takes half-precision x
        # with float32 factors, and a broadcast addcmul is up to ten times slower on a CPU.
        zero, one = torch.zeros_like(slope), torch.ones_like(slope)
        linear = torch.batch_norm(x, slope, offset, zero, one, False, 0.0, 0.0, False)
        return linear.add_(grad)


def expected_statistics(
    layer: _BatchNorm | FoldedBatchNorm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a layer says of its input y, per channel: its mean, its variance, the factor that takes
    y - mean back to the input x of the BatchNorm, and the stored variance of x."""
    if isinstance(layer, FoldedBatchNorm):
        # y = factor * (x - mean_l) + shift. A channel whose gamma has died says nothing about x.
        alive = layer.factor.abs() > 1e-3 * layer.factor.abs().median()
        inverse = torch.where(alive, 1 / layer.factor, 0.0)
        return layer.shift, layer.var * layer.factor.square(), inverse, layer.var
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return (
        layer.running_mean,
        layer.running_var,
        torch.ones_like(layer.running_var),
        (layer.running_var),
    )


class _Constants:
    """What is known of all channels of all layers, end to end, so that one operation does for a
    network what would else be dozens of small ones for each layer.

    Attributes:
        mean, var: expected of the layers' inputs.
        to_mean, to_var: factors of the differences from them.
        layer: index of the layer a channel belongs to.
        count: the number of layers.
    """

    def __init__(self, layers: list[_BatchNorm | FoldedBatchNorm], relative: bool) -> None:
        means, variances, to_means, to_vars, owners = [], [], [], [], []
        for index, layer in enumerate(layers):
            mean, var, factor, stored = expected_statistics(layer)
            to_mean, to_var = factor, factor.square()
            if relative:
                spread, root = stored + 1e-5, math.sqrt(len(stored))
                to_mean, to_var = to_mean * spread.rsqrt() / root, to_var / spread / root
            means.append(mean)
            variances.append(var)
            to_means.append(to_mean)
            to_vars.append(to_var)
            owners.append(torch.full_like(mean, index, dtype=torch.long))
        self.mean, self.var = torch.cat(means), torch.cat(variances)
        self.to_mean, self.to_var = torch.cat(to_means), torch.cat(to_vars)
        self.layer, self.count = torch.cat(owners), len(layers)

    def norms(self, values: Tensor) -> Tensor:
        """L2 norms over the channels of each layer: `(layers,)` of `(channels of all,)`."""
        squares = values.new_zeros(self.count).index_add(0, self.layer, values.square())
        # Away from zero, where the root has no gradient.
        return squares.clamp_min(1e-30).sqrt()


def has_statistics(module: nn.Module) -> bool:
    """Whether a network has BatchNorm statistics, of layers folded or not."""
    return bool(_layers(module))


def _layers(module: nn.Module) -> dict[str, _BatchNorm | FoldedBatchNorm]:
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, FoldedBatchNorm)
        or (isinstance(child, _BatchNorm) and child.running_mean is not None)
    }


class BatchNormStatistics:
    """Watches the inputs of every BatchNorm of a frozen network; a context manager.

    A folded BatchNorm counts like any other: the statistics of what went into it follow from those
    of what the folded convolution gives, and a network without BatchNorm layers runs faster.

    Args:
        module: the network, in eval mode.
        run: runs one forward pass of it on any input, to see which layers' values are overwritten
            by what comes after (a residual sum in place, say) and so have to be kept apart; None:
            none are.

    Raises:
        UserError: if it holds no BatchNorm with running statistics.
    """

    def __init__(self, module: nn.Module, run: Callable[[], object] | None = None) -> None:
        self.layers = _layers(module)
        if not self.layers:
            raise UserError(
                "the model has no BatchNorm statistics to match: it has no BatchNorm layer, or "
                "they were fused away; use an unfused checkpoint, or --set synthesis.weights.bn=0 "
                "--set synthesis.weights.first_bn=0"
            )
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._constants: dict[tuple[bool, tuple[str, ...]], _Constants] = {}
        self._handles: list[Any] = []
        self._overwritten = self._find_overwritten(run) if run is not None else frozenset()

    def _find_overwritten(self, run: Callable[[], object]) -> frozenset[str]:
        passed: list[tuple[str, Tensor, int]] = []
        handles = []
        for name, layer in self.layers.items():

            def note(_m: nn.Module, _i: object, output: Tensor, name: str = name) -> None:
                passed.append((name, output, output._version))

            # Of a BatchNorm proper the output is another tensor than the input that is watched.
            if isinstance(layer, FoldedBatchNorm):
                handles.append(layer.register_forward_hook(note))
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()
        return frozenset(name for name, output, then in passed if output._version != then)

    def __enter__(self) -> BatchNormStatistics:
        for name, layer in self.layers.items():

            def tap(_m: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> tuple[Tensor]:
                x, mean, var = _Moments.apply(inputs[0])
                self._seen[name] = (mean, var)
                return (x.clone() if name in self._overwritten else x,)

            self._handles.append(layer.register_forward_pre_hook(tap))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def distances(self, *, relative: bool = False) -> Tensor:
        """Of the last forward pass: ||mu - mu_l||_2 + ||var - var_l||_2 of each layer, `(layers,)`
        in the order the layers ran.

        Args:
            relative: in units of each channel's own standard deviation and variance, root mean
                square over the channels, so that no layer counts for more because its values are
                larger or its channels more.
        """
        if not self._seen:
            raise RuntimeError("no forward pass to tell of")
        key = relative, tuple(self._seen)
        if key not in self._constants:
            layers = [self.layers[name] for name in self._seen]
            self._constants[key] = _Constants(layers, relative)
        known = self._constants[key]
        mean = torch.cat([mean for mean, _ in self._seen.values()])
        var = torch.cat([var for _, var in self._seen.values()])
        self._seen.clear()
        to_mean = known.norms((mean - known.mean) * known.to_mean)
        return to_mean + known.norms((var - known.var) * known.to_var)

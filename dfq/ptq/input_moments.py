"""What a quantized layer and its float original see at the same samples, as second moments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..graph.execution import StopForward, calls_in_order, hooks
from ..quantization.layers import QuantConv2d, QuantLinear
from ..quantization.traversal import quantized_layers

UNPAIRED = 0.75
"""Mean squared difference of paired inputs, over the sum of their variances, from which they are
taken for no pairs: independent draws of one distribution have 1."""


def execution_order(module: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Names of the quantized layers in the order they first run, with the calls in one pass."""
    return calls_in_order(quantized_layers(module), run)


def inputs_of(layer: nn.Module, calls: int, run: Callable[[], object]) -> list[Tensor]:
    """The first argument of the layer in each of its `calls` calls of one forward pass, which is
    stopped after the last: `(n, c, h, w)`, or `(..., c)` of a linear layer."""
    layer_inputs: list[Tensor] = []

    def before(_m: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        layer_inputs.append(inputs[0])
        if len(layer_inputs) == calls:
            raise StopForward

    with hooks([layer.register_forward_pre_hook(before)]), contextlib.suppress(StopForward):
        run()
    return layer_inputs


def columns(layer: nn.Module, x: Tensor, samples: Tensor) -> Tensor:
    """The inputs of single output elements.

    Args:
        layer: a convolution or linear layer.
        x: its input `(n, c, h, w)`, or `(..., c)` for a linear layer.
        samples: int64 `(m,)`, flat indices into the output's samples: `(n, oh, ow)`, or `(...)`.

    Returns:
        float32 `(groups, m, k)`: with the weight as `(groups, out / groups, k)`, the output at the
        samples is `columns @ weight.mT` plus the bias.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[samples][None].float()
    assert isinstance(layer, nn.Conv2d)
    (kernel_y, kernel_x), (stride_y, stride_x) = layer.kernel_size, layer.stride
    dilation_y, dilation_x = layer.dilation
    height, width = output_size(layer, x)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    image, place = samples // (height * width), samples % (height * width)
    top, left = place // width * stride_y, place % width * stride_x
    rows = top[:, None] + dilation_y * torch.arange(kernel_y, device=x.device)
    across = left[:, None] + dilation_x * torch.arange(kernel_x, device=x.device)
    # (m, ky, kx, c) of a view with the channels last.
    patches = padded.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], across[:, None, :]]
    groups = layer.groups
    patches = patches.unflatten(3, (groups, x.shape[1] // groups)).permute(3, 0, 4, 1, 2)
    return patches.reshape(groups, len(samples), -1).float()


def output_size(layer: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Height and width of the convolution's output for an input `(n, c, h, w)`."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    spans = (x.shape[2] + top + bottom, x.shape[3] + left + right)
    return tuple(
        (span - dilation * (kernel - 1) - 1) // stride + 1
        for span, kernel, stride, dilation in zip(
            spans, layer.kernel_size, layer.stride, layer.dilation, strict=True
        )
    )


def place_count(layer: nn.Module, x: Tensor) -> int:
    """Number of output samples that `columns` can be asked for, given the layer's input `x` (see
    there)."""
    if isinstance(layer, nn.Conv2d):
        height, width = output_size(layer, x)
        return len(x) * height * width
    return x.numel() // x.shape[-1]


@dataclass
class Moments:
    """Moments of a layer's inputs over the calibration images.

    With x what the quantized network gives the layer and y what the float one gives at the same
    samples, all `(groups, ...)`:

    Attributes:
        hessian: E[x x^T] `(groups, k, k)`.
        cross: E[y x^T] `(groups, k, k)`.
        mean: E[x] `(groups, k)`.
        float_mean: E[y] `(groups, k)`.
        samples: how many the averages are over.
    """

    hessian: Tensor
    cross: Tensor
    mean: Tensor
    float_mean: Tensor
    samples: int

    @property
    def inputs_per_sample(self) -> float:
        """Inputs for each place looked at: how far moments of that many are from settled."""
        return self.hessian.shape[1] / self.samples

    def centred(self) -> Moments:
        """The same about the means: covariances, and means of zero."""
        hessian = self.hessian - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)
        cross = self.cross - self.float_mean.unsqueeze(2) * self.mean.unsqueeze(1)
        zero = torch.zeros_like(self.mean)
        return Moments(hessian, cross, zero, zero, self.samples)


class MomentSums:
    """Adds up `Moments` batch by batch, over a sample of the samples.

    Args:
        layer: the quantized layer.
        samples: how many output samples are looked at in all.
        batches: over how many calls of `add` they are spread.
        generator: draws them.
    """

    def __init__(
        self, layer: QuantConv2d | QuantLinear, samples: int, batches: int, generator: Generator
    ) -> None:
        self.layer, self.generator = layer, generator
        self.share = -(-samples // max(1, batches))
        self.count = 0
        self.unpaired = False
        self._sums: list[Tensor] | None = None

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Add one call's inputs, of shapes as `columns` takes them.

        Args:
            ours: of the quantized layer, before its quantizer.
            theirs: of the float layer. Where the two do not belong to the same samples, `ours` is
                used for both.
        """
        layer = self.layer
        ours = layer.input_quantizer(ours)
        available = place_count(layer, ours)
        if ours.shape != theirs.shape:
            self.unpaired, theirs = True, ours
        samples = torch.randperm(available, generator=self.generator)[: self.share].to(ours.device)
        x, y = columns(layer, ours, samples), columns(layer, theirs, samples)
        spread = x.var(correction=0) + y.var(correction=0) + 1e-12
        # Proposals of a two-stage detector, for one, need not be the same in both networks.
        if (x - y).square().mean() > UNPAIRED * spread:
            self.unpaired, y = True, x
        sums = [x.mT @ x, y.mT @ x, x.sum(1), y.sum(1)]
        if self._sums is None:
            self._sums = sums
        else:
            torch._foreach_add_(self._sums, sums)
        self.count += len(samples)

    def moments(self) -> Moments:
        """What was added up; of unpaired inputs, the quantized network's stand for both."""
        assert self._sums is not None
        hessian, cross, mean, float_mean = (total / self.count for total in self._sums)
        if self.unpaired:
            cross, float_mean = hessian, mean
        return Moments(hessian, cross, mean, float_mean, self.count)

"""The patch-similarity entropy of attention (PSAQ-ViT, Li et al., ECCV 2022; for Swin's windows).

A transformer has no BatchNorm statistics to invert. What tells an image from noise is how its
patches answer to attention: in an image, those of an object resemble each other and differ from
the background's; in noise, all resemble each other about equally. So the similarities between the
tokens of a window should be spread out, which is to say that their differential entropy

    H = -integral of f(x) log f(x) dx,   f(x) = 1/n sum_m N(x; s_m, b)

is large, with s_m the cosine similarities of all n pairs of tokens and f their kernel density.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BANDWIDTH = 0.01
"""Of the Gaussian kernel, in units of cosine similarity, at least."""

POINTS = 20
"""Places at which the density of a window is evaluated."""


class _Density(torch.autograd.Function):
    """Kernel density of `(w, n)` samples at `(w, p)` places, bandwidths `(w, 1)`: `(w, p)`.

    Place by place, forwards and backwards, so that no tensor of n times p is ever held: the pairs
    of all windows of a batch are hundreds of megabytes as it is.
    """

    @staticmethod
    def forward(ctx: Any, samples: Tensor, places: Tensor, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(samples, places, bandwidth)
        columns = []
        for place in places.split(1, dim=1):
            kernel = ((samples - place) / bandwidth).square_().mul_(-0.5).exp_()
            columns.append(kernel.mean(dim=1, keepdim=True))
        return torch.cat(columns, dim=1) / (bandwidth * math.sqrt(2 * math.pi))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        samples, places, bandwidth = ctx.saved_tensors
        # d density / d sample = kernel * -(sample - place) / b^2 / n
        factor = -grad / (bandwidth.square() * samples.shape[1] * math.sqrt(2 * math.pi))
        result = torch.zeros_like(samples)
        for place, weight in zip(places.split(1, dim=1), factor.split(1, dim=1), strict=True):
            away = (samples - place) / bandwidth
            result.addcmul_(away.square().mul_(-0.5).exp_().mul_(away), weight)
        return result, None, None


def kernel_entropy(
    samples: Tensor, *, bandwidth: float = BANDWIDTH, points: int = POINTS
) -> Tensor:
    """Differential entropy of the kernel density of each row, in nats.

    The density is evaluated at `points` places, evenly from three bandwidths below the row's least
    sample to three above its largest, and integrated by the trapezoid rule. Where they would be
    further apart than `bandwidth`, the kernel is widened to their distance, so that no sample lies
    between the places unseen. Rows of equal samples have the entropy of one kernel: finite.

    Args:
        samples: `(rows, n)`.
        bandwidth: above 0.
        points: 8 or more.

    Returns:
        `(rows,)`. Its gradient takes places and bandwidth as given.
    """
    if points < 8:
        raise ValueError(f"points must be 8 or more, got {points}")
    with torch.no_grad():
        low, high = samples.aminmax(dim=1, keepdim=True)
        # The places are b apart that span range + 6 b in points - 1 steps.
        width = ((high - low) / (points - 7)).clamp_min(bandwidth)
        start, length = low - 3 * width, high - low + 6 * width
        steps = torch.linspace(0, 1, points, device=samples.device, dtype=samples.dtype)
        places, gap = start + length * steps, length / (points - 1)
    density = _Density.apply(samples, places, width)
    integrand = torch.special.entr(density.clamp_min(torch.finfo(samples.dtype).tiny))
    inner = integrand.sum(dim=1) - (integrand[:, 0] + integrand[:, -1]) / 2
    return inner * gap[:, 0]


def patch_similarity_entropy(tokens: Tensor, **options: Any) -> Tensor:
    """Mean over windows of the entropy of the cosine similarities between their tokens.

    All pairs count, each once; a token's similarity with itself does not.

    Args:
        tokens: what attention gives, `(windows, tokens, channels)`, two tokens or more.
        options: of `kernel_entropy`.

    Returns:
        A scalar.
    """
    directions = F.normalize(tokens.float(), dim=2, eps=1e-6)
    similarity = directions @ directions.transpose(1, 2)
    count = tokens.shape[1]
    first, second = torch.triu_indices(count, count, offset=1, device=tokens.device)
    return kernel_entropy(similarity[:, first, second], **options).mean()


class PatchSimilarity:
    """Watches what the attention layers of a network give; a context manager.

    Args:
        module: the network.
        names: qualified names of its attention layers, whose outputs are
            `(windows, tokens, channels)`.
        skipped: so many tokens that come first count for nothing: they are no patches'.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], skipped: int = 0) -> None:
        self.skipped = skipped
        self.layers = {name: module.get_submodule(name) for name in names}
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> PatchSimilarity:
        for name, layer in self.layers.items():

            def watch(_m: nn.Module, _i: object, tokens: Tensor, name: str = name) -> None:
                self._seen[name] = patch_similarity_entropy(tokens[:, self.skipped :])

            self._handles.append(layer.register_forward_hook(watch))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def entropy(self, *, summed: bool = False) -> Tensor:
        """Mean over the layers of the last forward pass, a scalar, to be maximised.

        Args:
            summed: the sum over the layers instead, as in the paper's public code.
        """
        if not self._seen:
            raise RuntimeError("no forward pass to tell of")
        entropies = torch.stack(list(self._seen.values()))
        self._seen.clear()
        return entropies.sum() if summed else entropies.mean()

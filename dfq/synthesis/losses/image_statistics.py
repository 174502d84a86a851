"""BatchNorm distances of each image alone, beside those of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.batchnorm import gaussian_divergence
from .batchnorm import BatchNormStatistics
from .expected import expected_statistics


class ImageStatistics:
    """Watches the layers of a `BatchNormStatistics`, image by image; a context manager.

    A batch can meet the statistics while none of its images does: one too bright, one too dark.

    Args:
        statistics: whose layers are watched.
        form: of the distances, see `Synthesis.bn_form`.
    """

    def __init__(self, statistics: BatchNormStatistics, form: str) -> None:
        self.layers = statistics.layers
        self.form = form
        self._seen: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> ImageStatistics:
        for layer in self.layers.values():
            expected = expected_statistics(layer, relative=self.form != "absolute")
            distance = _divergence if self.form == "gaussian" else _distance

            def watch(
                _m: nn.Module,
                inputs: tuple[Tensor, ...],
                known: tuple[Tensor, ...] = expected,
                distance: Callable[..., Tensor] = distance,
            ) -> None:
                if torch.is_grad_enabled():
                    self._seen.append(distance(inputs[0].float(), *known))

            self._handles.append(layer.register_forward_pre_hook(watch))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def distances(self) -> Tensor:
        """Of the last forward pass that recorded gradients, the mean over the images of
        the layers' distances, as of a batch in `BatchNormStatistics`: `(runs,)` in the order the
        layers ran."""
        found = torch.stack(self._seen)
        self._seen.clear()
        return found


def _per_image(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """How far the means are from the expected one, and the variances, `(n, c)` each."""
    # As E[x^2] - E[x]^2 about the expected mean: one pass and little to keep for the way back.
    centred = x - mean[:, None, None]
    offset = centred.mean(dim=(2, 3))
    return offset, centred.square().mean(dim=(2, 3)) - offset.square()


def _divergence(x: Tensor, mean: Tensor, var: Tensor, to_mean: Tensor, _to_var: Tensor) -> Tensor:
    offset, spread = _per_image(x, mean)
    return gaussian_divergence(offset, spread, var)[:, to_mean > 0].mean()


def _distance(x: Tensor, mean: Tensor, var: Tensor, to_mean: Tensor, to_var: Tensor) -> Tensor:
    offset, spread = _per_image(x, mean)
    apart = (offset * to_mean).square().sum(1), ((spread - var) * to_var).square().sum(1)
    # Away from zero, where the root has no gradient.
    return sum((a.clamp_min(1e-30).sqrt() for a in apart), torch.zeros_like(apart[0])).mean()

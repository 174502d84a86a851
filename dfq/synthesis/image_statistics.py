"""BatchNorm distances of each image alone, beside those of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .statistics import BatchNormStatistics, expected_statistics


class ImageStatistics:
    """Watches the layers of a `BatchNormStatistics`, image by image; a context manager.

    A batch can meet the statistics while none of its images does: one too bright, one too dark.

    Args:
        statistics: whose layers are watched.
        relative: see `BatchNormStatistics.distances`.
    """

    def __init__(self, statistics: BatchNormStatistics, *, relative: bool) -> None:
        self.layers = statistics.layers
        self.relative = relative
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> ImageStatistics:
        for name, layer in self.layers.items():
            expected = expected_statistics(layer, relative=self.relative)

            def watch(
                _m: nn.Module,
                inputs: tuple[Tensor, ...],
                name: str = name,
                known: tuple[Tensor, ...] = expected,
            ) -> None:
                if torch.is_grad_enabled():
                    self._seen[name] = _distance(inputs[0].float(), *known)

            self._handles.append(layer.register_forward_pre_hook(watch))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def distances(self) -> Tensor:
        """Of the last forward pass that recorded gradients, the mean over the images of
        ||mu - mu_l||_2 + ||var - var_l||_2, `(layers,)` in the order the layers ran."""
        found = torch.stack(list(self._seen.values()))
        self._seen.clear()
        return found


def _distance(x: Tensor, mean: Tensor, var: Tensor, to_mean: Tensor, to_var: Tensor) -> Tensor:
    # As E[x^2] - E[x]^2 about the expected mean: one pass and little to keep for the way back.
    centred = x - mean[:, None, None]
    offset = centred.mean(dim=(2, 3))
    spread = centred.square().mean(dim=(2, 3)) - offset.square()
    apart = (offset * to_mean).square().sum(1), ((spread - var) * to_var).square().sum(1)
    # Away from zero, where the root has no gradient.
    return sum((a.clamp_min(1e-30).sqrt() for a in apart), torch.zeros_like(apart[0])).mean()

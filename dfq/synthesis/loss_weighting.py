"""From the terms of the synthesis loss to one gradient on the images.

A YOLOv5 and a YOLO11 of one size differ a hundredfold in the gradients of their losses, and a deep
network has more BatchNorm distances to sum than a shallow one: weights on the losses, as in
the paper, have to be found anew for each of them. `GradientNormWeighting` reads a weight as a share
of the gradient instead, which holds for every network, batch and image size; `FixedWeighting` is
the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from .losses.total_variation import batch_norms, image_norm, squared_variation, total_variation
from .settings import SynthesisWeights

MEASURE_EVERY = 20
"""Iterations between two measurements, each of which costs one more backward pass."""

SETTLED_TASK = 0.1
"""Of the weight of the task's loss, while images settle."""

_DECAY = 0.5
"""Of the averaged norms: a single batch's flips and erasures should not set them alone."""


Parts = Iterable[tuple[dict[str, Tensor], Tensor]]
"""Of a batch, one after the other: the terms, and what the network saw, `(n_i, 3, h, w)`, a leaf.

Terms are "bn" (of all layers) and "first_bn" (absent where "bn" has it in), both of the whole
batch whatever the part, and "entropy" and "task", the part's share of them; what is not used is
absent. Of several batches side by side, shards, what is seen holds the images one shard after the
other, and a term is `(shards,)`: each shard gets the gradient that it would get alone."""

_OF_THE_BATCH = ("bn", "first_bn")


class LossWeighting(Protocol):
    """Turns the terms of an iteration into the gradient the optimizer sees."""

    def __call__(self, parts: Parts, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of what the network saw, `(n, 3, h, w)` of its type, and the batch's terms
        for logs.

        Args:
            parts: a part is done with before the next one is asked for.
            step: the iteration; see `MEASURE_EVERY`.
        """

    def settle(self) -> None:
        """From now on the statistics count nearly alone: the task's loss for `SETTLED_TASK` of its
        weight, total variation and image norm not at all."""

    def smoothed(self, gradient: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the gradient of the total variation.

        Args:
            gradient: of `pixels`, `(n, 3, h, w)`; may be changed in place.
            pixels: the images `(n, 3, h, w)`.

        Returns:
            The gradient `(n, 3, h, w)`; the total variation for logs, a scalar, or `(shards,)` for
            several shards.
        """

    def darkened(self, gradient: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the gradient of the image norm, which pulls towards black; shapes as in
        `smoothed`."""


def _note(logged: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
    for name, term in terms.items():
        known = None if name in _OF_THE_BATCH else logged.get(name)
        logged[name] = term.detach() if known is None else term.detach() + known


def settled(weights: SynthesisWeights) -> SynthesisWeights:
    """See `LossWeighting.settle`."""
    return weights.model_copy(update={"task": SETTLED_TASK * weights.task, "tv": 0.0, "l2": 0.0})


class FixedWeighting:
    """The paper's sum: weights times losses, total variation a norm over the whole batch, image
    norm the mean over the images."""

    def __init__(self, weights: SynthesisWeights, shards: int = 1) -> None:
        self.weights, self.shards = weights, shards

    def settle(self) -> None:
        self.weights = settled(self.weights)

    def __call__(self, parts: Parts, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.weights.model_dump()
        gradients, logged = [], dict[str, Tensor]()
        for terms, view in parts:
            _note(logged, terms)
            if "first_bn" not in terms:
                weights["bn"] = self.weights.bn or 1.0
            gradients.append(_gradient([(weights[n], term) for n, term in terms.items()], view))
        return _joined(gradients), logged

    def smoothed(self, gradient: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self._with(total_variation, self.weights.tv, gradient, pixels)

    def darkened(self, gradient: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self._with(image_norm, self.weights.l2, gradient, pixels)

    def _with(
        self,
        prior: Callable[[Tensor, int], Tensor],
        weight: float,
        gradient: Tensor,
        pixels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The gradient with that of a weighted prior on the images added, and the prior."""
        if weight == 0:
            return gradient, _nothing(gradient, self.shards)
        with torch.enable_grad():
            leaf = pixels.detach().requires_grad_()
            value = prior(leaf, self.shards)
            (prior_gradient,) = torch.autograd.grad(value.sum(), leaf)
        return gradient.add_(prior_gradient, alpha=weight), value.detach()


def by_image(values: Tensor, images: int) -> Tensor:
    """Values `(shards,)` as one for each image, `(images,)`, one shard after the other."""
    return values[:, None].expand(-1, images // len(values)).reshape(-1)


def _nothing(like: Tensor, shards: int) -> Tensor:
    return like.new_zeros(() if shards == 1 else (shards,))


class GradientNormWeighting:
    """Brings the gradients of BatchNorm and task terms to unit norm times their weights; total
    variation and image norm then get, image by image, their weights' shares of their sum."""

    def __init__(self, weights: SynthesisWeights, shards: int = 1) -> None:
        self.weights, self.shards = weights, shards
        # Of each shard; changed in place, for what was recorded of an iteration to see it.
        self.norms: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        self._alone = True

    def settle(self) -> None:
        self.weights = settled(self.weights)
        self._update_factors({**self.weights.model_dump(), "bn": self.weights.bn or 1.0})

    def _groups(self, terms: dict[str, Tensor]) -> dict[str, tuple[float, Tensor]]:
        groups = {}
        if "bn" in terms:
            term, first = terms["bn"], terms.get("first_bn")
            if first is not None:
                # With bn=0 the first layer stands alone; else it counts `first_bn` times more.
                rest = term if self.weights.bn > 0 else torch.zeros_like(term)
                term = rest + self.weights.first_bn * first
            groups["bn"] = (self.weights.bn or 1.0, term)
        if "entropy" in terms:
            groups["entropy"] = (self.weights.entropy, terms["entropy"])
        if "task" in terms:
            groups["task"] = (self.weights.task, terms["task"])
        return groups

    def _update_factors(self, shares: dict[str, float]) -> None:
        """After norms or shares changed."""
        for name, norm in self.norms.items():
            factor = shares[name] / norm.clamp_min(1e-12)
            if name in self._factors:
                self._factors[name].copy_(factor)
            else:
                self._factors[name] = factor

    def _scaled(self, name: str, gradient: Tensor) -> Tensor:
        factor = self._factors[name]
        if self.shards > 1:
            factor = by_image(factor, len(gradient))[:, None, None, None]
        return factor * gradient

    def __call__(self, parts: Parts, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        gradients, logged = [], dict[str, Tensor]()
        # Apart now and then, to measure them, and added up afterwards: a backward pass more.
        apart: dict[str, list[Tensor]] = {}
        shares: dict[str, float] = {}
        for terms, view in parts:
            _note(logged, terms)
            groups = self._groups(terms)
            self._alone = not groups
            if step % MEASURE_EVERY == 0 and len(groups) > 1:
                for name, (share, term) in groups.items():
                    more = name != list(groups)[-1]
                    (gradient,) = torch.autograd.grad(term.sum(), view, retain_graph=more)
                    apart.setdefault(name, []).append(gradient)
                    shares[name] = share
            else:
                scaled = [
                    (self._factors.get(name, share), term) for name, (share, term) in groups.items()
                ]
                gradients.append(_gradient(scaled, view))
        if apart:
            # Of half-precision images they are of that type: too coarse for sums over all pixels.
            whole = {
                name: torch.cat(view_gradients).float() for name, view_gradients in apart.items()
            }
            for name, gradient in whole.items():
                norm, average = batch_norms(gradient, self.shards), self.norms.get(name)
                if average is None:
                    self.norms[name] = norm
                else:
                    average.copy_(torch.lerp(norm, average, _DECAY))
            self._update_factors(shares)
            total = [self._scaled(name, gradient) for name, gradient in whole.items()]
            return torch.stack(total).sum(0).to(view.dtype), logged
        return _joined(gradients), logged

    def smoothed(self, gradient: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self.weights.tv == 0:
            return gradient, _nothing(gradient, self.shards)
        roughness, smooth, norms = squared_variation(pixels.detach(), self.shards)
        return self._shared(gradient, self.weights.tv, smooth, norms), roughness.sqrt()

    def darkened(self, gradient: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self.weights.l2 == 0:
            return gradient, _nothing(gradient, self.shards)
        # The norm's gradient has the direction of the image itself.
        images = pixels.detach()
        norms = torch.linalg.vector_norm(images, dim=(1, 2, 3))
        darkness = norms.mean() if self.shards == 1 else norms.view(self.shards, -1).mean(1)
        return self._shared(gradient, self.weights.l2, images, norms), darkness

    def _shared(self, gradient: Tensor, share: float, direction: Tensor, norms: Tensor) -> Tensor:
        """The gradient with a share of its own norm, image by image, in another direction added:
        as it is, where nothing else counts."""
        if self._alone:
            return gradient.add_(direction, alpha=share)
        reference = torch.linalg.vector_norm(gradient, dim=(1, 2, 3))
        weight = reference / norms.clamp_min(1e-12)
        return gradient.addcmul_(direction, weight[:, None, None, None], value=share)


def _joined(gradients: list[Tensor]) -> Tensor:
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients)


def _gradient(terms: list[tuple[Tensor | float, Tensor]], view: Tensor) -> Tensor:
    """Of the sum of terms times their factors, with respect to `view`; zero where there are none.

    Args:
        terms: factors, numbers or tensors shaped as the terms, and the terms.
    """
    if not terms:
        return torch.zeros_like(view)
    factors = [
        factor if isinstance(factor, Tensor) else torch.full_like(term, factor)
        for factor, term in terms
    ]
    return torch.autograd.grad([term for _, term in terms], view, factors)[0]


WEIGHTINGS: dict[str, Callable[..., LossWeighting]] = {
    "gradient": GradientNormWeighting,
    "loss": FixedWeighting,
}

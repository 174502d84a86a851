"""From the terms of the synthesis loss to one gradient on the images.

A YOLOv5 and a YOLO11 of one size differ a hundredfold in the gradients of their losses, and a deep
network has more BatchNorm distances to sum than a shallow one: weights on the losses, as in
the paper, have to be found anew for each of them. `GradientShares` reads a weight as a share of the
gradient instead, which holds for every network, batch and image size; `LossWeights` is the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..recipe_synthesis import SynthesisWeights
from .priors import squared_variation, total_variation

MEASURE_EVERY = 20
"""Iterations between two measurements, each of which costs one more backward pass."""

_DECAY = 0.5
"""Of the averaged norms: a single batch's flips and erasures should not set them alone."""


class Combination(Protocol):
    """Turns the terms of an iteration into the gradient the optimizer sees."""

    def __call__(
        self, terms: dict[str, Tensor], view: Tensor, pixels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """The gradient, and the total variation for logs.

        Args:
            terms: "bn" (summed over the layers), "first_bn", "entropy" and "task"; what is not used
                is absent.
            view: what the network saw: `pixels`, augmented, in one graph with them.
            pixels: the images, a leaf `(n, 3, h, w)`.
            step: the iteration.
        """


class LossWeights:
    """The paper's sum: weights times losses, total variation a norm over the whole batch."""

    def __init__(self, weights: SynthesisWeights) -> None:
        self.weights = weights

    def __call__(
        self, terms: dict[str, Tensor], view: Tensor, pixels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        weights = self.weights.model_dump()
        smoothness = total_variation(pixels)
        loss = weights["tv"] * smoothness
        for name, term in terms.items():
            loss = loss + weights[name] * term
        return torch.autograd.grad(loss, pixels)[0], smoothness.detach()


class GradientShares:
    """Brings the gradients of BatchNorm and task terms to unit norm times their weights; total
    variation then gets, image by image, its weight's share of their sum."""

    def __init__(self, weights: SynthesisWeights) -> None:
        self.weights = weights
        self.norms: dict[str, Tensor] = {}

    def _groups(self, terms: dict[str, Tensor]) -> dict[str, tuple[float, Tensor]]:
        groups = {}
        if "bn" in terms:
            # With bn=0 the first layer stands alone; else it counts `first_bn` times more.
            rest = terms["bn"] if self.weights.bn > 0 else torch.zeros_like(terms["bn"])
            share = self.weights.bn or 1.0
            groups["bn"] = (share, rest + self.weights.first_bn * terms["first_bn"])
        if "entropy" in terms:
            groups["entropy"] = (self.weights.entropy, terms["entropy"])
        if "task" in terms:
            groups["task"] = (self.weights.task, terms["task"])
        return groups

    def _factor(self, name: str, share: float) -> Tensor | float:
        norm = self.norms.get(name)
        return share if norm is None else share / norm.clamp_min(1e-12)

    def __call__(
        self, terms: dict[str, Tensor], view: Tensor, pixels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        groups = self._groups(terms)
        if not groups:
            gradient = torch.zeros_like(pixels)
        elif step % MEASURE_EVERY == 0 and len(groups) > 1:
            # Apart this time, to measure them, and added up afterwards: one backward pass more.
            apart = {
                name: torch.autograd.grad(term, view, retain_graph=True)[0]
                for name, (_, term) in groups.items()
            }
            for name, one in apart.items():
                norm, seen = torch.linalg.vector_norm(one), self.norms.get(name)
                self.norms[name] = norm if seen is None else torch.lerp(norm, seen, _DECAY)
            total = torch.stack([self._factor(n, s) * apart[n] for n, (s, _) in groups.items()])
            gradient = torch.autograd.grad(view, pixels, total.sum(0))[0]
        else:
            scaled = [self._factor(name, share) * term for name, (share, term) in groups.items()]
            gradient = torch.autograd.grad(torch.stack(scaled).sum(), pixels)[0]
        if self.weights.tv == 0:
            return gradient, gradient.new_zeros(())
        roughness, smooth = squared_variation(pixels.detach())
        weight = _norm_ratio(gradient, smooth) if groups else torch.ones((), device=smooth.device)
        return gradient.addcmul_(smooth, self.weights.tv * weight), roughness.sqrt()


def _norm_ratio(wanted: Tensor, present: Tensor) -> Tensor:
    """Norm of `wanted` over that of `present`, image by image; both `(n, c, h, w)`."""
    dims = (1, 2, 3)
    reference = torch.linalg.vector_norm(wanted, dim=dims, keepdim=True)
    return reference / torch.linalg.vector_norm(present, dim=dims, keepdim=True).clamp_min(1e-12)


COMBINATIONS: dict[str, Callable[[SynthesisWeights], Combination]] = {
    "gradient": GradientShares,
    "loss": LossWeights,
}

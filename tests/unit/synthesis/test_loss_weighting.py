"""How the terms of the loss become one gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dfq.synthesis.loss_weighting import (
    MEASURE_EVERY,
    FixedWeighting,
    GradientNormWeighting,
    LossWeighting,
)
from dfq.synthesis.losses.total_variation import squared_variation, total_variation
from dfq.synthesis.settings import SynthesisWeights

SHAPE = (2, 3, 6, 6)


def weights(**given: float) -> SynthesisWeights:
    return SynthesisWeights(**{"bn": 0, "first_bn": 0, "task": 0, "tv": 0, **given})


def problem(**directions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Images, and terms with the given (constant) gradients."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(SHAPE, generator=generator).requires_grad_()
    return pixels, {name: (pixels * way).sum() for name, way in directions.items()}


def gradient_of(
    combination: LossWeighting, terms: dict[str, Tensor], pixels: Tensor, step: int = 0
) -> tuple[Tensor, Tensor]:
    """With total variation, and its value."""
    gradient, logged = combination([(terms, pixels)], step)
    assert logged == terms
    return combination.smoothed(gradient, pixels)


def only(index: int, size: float) -> Tensor:
    """A gradient at one pixel of each image."""
    way = torch.zeros(SHAPE)
    way.view(2, -1)[:, index] = size
    return way


def test_loss_weights_are_the_plain_sum() -> None:
    pixels, terms = problem(bn=only(0, 1), first_bn=only(1, 1), task=only(2, 1))
    chosen = weights(bn=2, first_bn=3, task=5, tv=0.5)
    gradient, logged = gradient_of(FixedWeighting(chosen), terms, pixels)
    smoothness = total_variation(pixels)
    expected = only(0, 2) + only(1, 3) + only(2, 5)
    expected = expected + 0.5 * torch.autograd.grad(smoothness, pixels)[0]
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(logged, smoothness.detach())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_shares_do_not_depend_on_the_size_of_a_loss(scale: float) -> None:
    # BatchNorm and the task pull at different pixels, so that their parts can be told apart.
    pixels, terms = problem(bn=only(0, 7), first_bn=only(0, 1), task=only(5, scale))
    gradient, _ = gradient_of(
        GradientNormWeighting(weights(bn=2, first_bn=3, task=0.5)), terms, pixels
    )
    # Unit norm over the batch times the weight; the batch has two images.
    torch.testing.assert_close(gradient, only(0, 2 / math.sqrt(2)) + only(5, 0.5 / math.sqrt(2)))


def test_the_first_layer_counts_within_the_batchnorm_part() -> None:
    pixels, terms = problem(bn=only(0, 4), first_bn=only(1, 1), task=only(5, 1))
    gradient, _ = gradient_of(
        GradientNormWeighting(weights(bn=1, first_bn=3, task=1)), terms, pixels
    )
    # 4 and 3 of a vector of norm 5, an image.
    expected = only(0, 4 / 5) + only(1, 3 / 5) + only(5, 1)
    torch.testing.assert_close(gradient, expected / math.sqrt(2))


def test_without_bn_the_first_layer_stands_alone() -> None:
    pixels, terms = problem(bn=only(0, 4), first_bn=only(1, 1), task=only(5, 1))
    gradient, _ = gradient_of(GradientNormWeighting(weights(first_bn=3, task=1)), terms, pixels)
    torch.testing.assert_close(gradient, (only(1, 1) + only(5, 1)) / math.sqrt(2))


def test_total_variation_gets_its_share_of_each_image() -> None:
    directions = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    directions[1] *= 100
    pixels, terms = problem(task=directions)
    plain, _ = gradient_of(GradientNormWeighting(weights(task=1)), terms, pixels)
    pixels, terms = problem(task=directions)
    smooth, _ = gradient_of(GradientNormWeighting(weights(task=1, tv=0.2)), terms, pixels)
    part = smooth - plain
    for image in range(2):
        assert float(part[image].norm() / plain[image].norm()) == pytest.approx(0.2, rel=1e-4)
    # Against it the image's own variation falls.
    before = total_variation(pixels.detach())
    assert total_variation(pixels.detach() - 1e-4 * part) < before


def test_the_image_norm_is_that_of_equation_4() -> None:
    # The gradient of a norm is the image over it; the mean is over the two images.
    pixels, terms = problem(task=only(2, 1))
    combination = FixedWeighting(weights(task=5, l2=0.3))
    gradient, _ = combination([(terms, pixels)], 0)
    gradient, value = combination.darkened(gradient, pixels)
    images = pixels.detach().double().numpy()
    norms = np.sqrt((images**2).sum((1, 2, 3)))
    assert float(value) == pytest.approx(norms.mean(), rel=1e-6)
    expected = 0.3 * images / norms[:, None, None, None] / 2 + only(2, 5).double().numpy()
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_the_image_norm_gets_its_share_of_each_image() -> None:
    directions = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    directions[1] *= 100
    pixels, terms = problem(task=directions)
    combination = GradientNormWeighting(weights(task=1, l2=0.2))
    plain, _ = combination([(terms, pixels)], 0)
    dark, _ = combination.darkened(plain.clone(), pixels)
    for one, before, image in zip(dark - plain, plain, pixels.detach(), strict=True):
        torch.testing.assert_close(one, 0.2 * before.norm() * image / image.norm())
    # Nothing of it is left where images settle.
    combination.settle()
    assert torch.equal(combination.darkened(plain.clone(), pixels)[0], plain)


def test_alone_total_variation_is_a_gradient_too() -> None:
    pixels, _ = problem()
    gradient, _ = gradient_of(GradientNormWeighting(weights(tv=1)), {}, pixels)
    _, expected, _ = squared_variation(pixels.detach())
    torch.testing.assert_close(gradient, expected)


def test_norms_are_measured_now_and_then() -> None:
    shares = GradientNormWeighting(weights(bn=1, task=1))
    sizes = []
    for step in range(MEASURE_EVERY + 1):
        # The task's gradient is tenfold after the first step.
        size = 1.0 if step == 0 else 10.0
        pixels, terms = problem(bn=only(0, 1), first_bn=only(0, 0), task=only(5, size))
        gradient, _ = gradient_of(shares, terms, pixels, step)
        sizes.append(float(gradient[0].reshape(-1)[5]) * math.sqrt(2))
    assert sizes[0] == pytest.approx(1)
    assert sizes[1:MEASURE_EVERY] == pytest.approx([10] * (MEASURE_EVERY - 1))
    # Half of the old norm and half of the new: 10 / 5.5.
    assert sizes[-1] == pytest.approx(10 / 5.5)

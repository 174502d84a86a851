"""Adam on several scales: what it is without them, and what they are there for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor

from dfq.synthesis.multiscale import MultiscaleAdam


def noise(side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=Generator().manual_seed(0))


def test_without_scales_it_is_adam_on_the_pixels() -> None:
    ours, theirs = noise().requires_grad_(), noise().requires_grad_()
    optimizer = MultiscaleAdam(ours, scales=0)
    adam = torch.optim.Adam([theirs], lr=0.02)
    for step in range(4):
        gradient = torch.randn(ours.shape, generator=Generator().manual_seed(step))
        theirs.grad = gradient
        adam.step()
        theirs.data.clamp_(0, 1)
        optimizer.step(gradient, 0.02)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("side", "scales", "grids"), [(32, 4, 4), (20, 4, 2), (32, 8, 5)])
def test_one_light_moves_by_the_rate_on_every_scale(side: int, scales: int, grids: int) -> None:
    images = torch.full((1, 3, side, side), 0.5, requires_grad=True)
    optimizer = MultiscaleAdam(images, scales)
    assert len(optimizer.grids) == grids
    optimizer.step(torch.ones(1, 3, side, side), 0.01)
    torch.testing.assert_close(images, torch.full_like(images, 0.5 - 0.01 * (1 + grids)))


def test_colour_moves_less_than_light() -> None:
    def moved(gradient: Tensor) -> Tensor:
        images = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
        optimizer = MultiscaleAdam(images, scales=2)
        optimizer.step(gradient[None, :, None, None].expand(1, 3, 16, 16), 0.01)
        # Without the step of the pixels themselves.
        return (images.detach() - 0.5 + 0.01 * gradient.sign()[None, :, None, None]).mean((0, 2, 3))

    light, chroma = moved(torch.ones(3)), moved(torch.tensor([1.0, 0.0, -1.0]))
    assert float(light.norm()) == pytest.approx(0.02 * math.sqrt(3), rel=1e-3)
    assert float(chroma.norm()) == pytest.approx(0.35 * float(light.norm()), rel=1e-3)
    assert abs(float(chroma.sum())) < 1e-6


def test_slow_changes_of_light_come_sooner() -> None:
    # What a sum over blocks asks for, with edges pulling single pixels to and fro.
    x = torch.linspace(0, 2 * math.pi, 64)
    wanted = (0.5 + 0.3 * x.sin()).expand(1, 3, 64, 64)

    def left(scales: int) -> float:
        images = noise(64)[:1].requires_grad_()
        optimizer = MultiscaleAdam(images, scales)
        generator = Generator().manual_seed(1)
        for _ in range(20):
            disturbance = torch.randn(images.shape, generator=generator)
            optimizer.step(images.detach() - wanted + disturbance, 0.02)
        blocks = torch.nn.functional.avg_pool2d(images.detach() - wanted, 16)
        return float(blocks.square().mean())

    assert left(4) < 0.3 * left(0)


def test_pixels_stay_in_range() -> None:
    images = noise().requires_grad_()
    MultiscaleAdam(images, scales=4).step(-torch.ones_like(images), 10.0)
    assert images.aminmax() == (1, 1)

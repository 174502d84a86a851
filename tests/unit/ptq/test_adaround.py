"""Rounding variables, against the paper's equations and against all roundings there are."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support.toys import SIDE, Toy
from torch import Tensor, nn

from dfq.ptq.adaround import SoftRounding
from dfq.ptq.blocks import reconstruct
from dfq.ptq.objectives import METHODS
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer


def quantizer_of(weight: Tensor, bits: int, *, asymmetric: bool = False) -> Quantizer:
    found = Quantizer(bits, channels=len(weight), asymmetric=asymmetric)
    span = weight.flatten(1).abs().amax(1)
    zero = torch.full((len(weight),), 2.0**bits / 2) if asymmetric else None
    found.initialise(span / (2 ** (bits - 1)) * 0.8, zero)
    return found


@pytest.mark.parametrize("asymmetric", [False, True])
def test_it_starts_at_the_float_weights_where_the_grid_reaches(asymmetric: bool) -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = quantizer_of(weight, 4, asymmetric=asymmetric)
    soft = SoftRounding(quantizer, weight)
    least, largest = quantizer.limits_of(weight)
    scale = quantizer.scale_of(weight)
    expected = weight.maximum(least * scale).minimum(largest * scale)
    torch.testing.assert_close(soft(weight), expected, atol=1e-5, rtol=1e-5)
    # Rounded at once, it is the nearest level.
    torch.testing.assert_close(soft.rounded(), quantizer(weight).detach())


@pytest.mark.parametrize("asymmetric", [False, True])
def test_rounded_weights_are_on_the_grid_whatever_was_learned(asymmetric: bool) -> None:
    weight = 3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    quantizer = quantizer_of(weight, 3, asymmetric=asymmetric)
    soft = SoftRounding(quantizer, weight)
    with torch.no_grad():
        soft.variable.copy_(20 * torch.randn(4, 8, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(quantizer(soft.rounded()).detach(), soft.rounded())


def test_integers_that_are_given_are_what_it_would_round_to_at_once() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    quantizer = quantizer_of(weight, 4)
    nearest = quantizer.integers(weight)
    # As GPTQ may leave them: up to two integers away.
    moved = torch.randint(-2, 3, (4, 8), generator=torch.Generator().manual_seed(4))
    codes = (nearest + moved).clamp(-8, 7)
    soft = SoftRounding(quantizer, weight, codes)
    torch.testing.assert_close(soft.rounded(), codes * quantizer.scale_of(weight))
    # All can still be moved.
    soft(weight).sum().backward()
    assert (soft.variable.grad != 0).all()


def test_sigmoid_and_regulariser_are_the_papers() -> None:
    weight = torch.randn(2, 5, generator=torch.Generator().manual_seed(5)).double()
    soft = SoftRounding(quantizer_of(weight.float(), 4), weight)
    values = [[-3.0, -1.0, 0.0, 0.5, 4.0], [2.0, -0.3, 0.1, -2.5, 1.0]]
    with torch.no_grad():
        soft.variable.copy_(torch.tensor(values))
    shares = [min(max(1 / (1 + math.exp(-v)) * 1.2 - 0.1, 0.0), 1.0) for row in values for v in row]
    torch.testing.assert_close(soft.share().flatten(), torch.tensor(shares))
    expected = sum(1 - abs(2 * share - 1) ** 7.5 for share in shares)
    assert float(soft.regulariser(7.5).detach()) == pytest.approx(expected, rel=1e-5)


class Eight(nn.Module):
    """One convolution of eight weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 2, bias=False)

    def forward(self, images: Tensor) -> Any:
        return self.conv(images[:, :2])


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_layer_of_eight_weights_is_rounded_as_well_as_all_but_a_few_of_256(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher = Toy(Eight())
    with torch.no_grad():
        teacher.module.conv.weight.copy_(torch.randn(1, 2, 2, 2, generator=generator))
    images = (torch.rand(32, 3, SIDE, SIDE, generator=generator) * 255).byte()
    policy = Policy(3, 16, first_last_bits="same", weight_grid="symmetric")
    student = insert_quantizers(teacher.clone(), policy)
    layer = student.module.conv
    layer.input_quantizer.initialise(torch.tensor([1 / 65535]))
    scale = torch.tensor([float(layer.weight.abs().max()) / 3.3])
    layer.weight_quantizer.initialise(scale)
    floor = (layer.weight / scale).floor().clamp(-4, 2)
    x = images.float()[:, :2] / 255
    wanted = teacher.module.conv(x)

    def error(weight: Tensor) -> float:
        return float((nn.functional.conv2d(x, weight) - wanted).square().mean())

    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)))
    errors = [error((floor + choice.view_as(floor)) * scale) for choice in choices]
    reconstruct(student, teacher, images, METHODS["adaround"], iterations=300, seed=seed)
    found = error(layer.weight.detach())
    assert sum(other < found - 1e-7 for other in errors) <= 2

"""Outputs of softmax on an even grid up to the greatest one: the equation, and what moves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.toys import SIDE, Toy
from torch import Tensor, nn

from dfq.graph.fold_batchnorm import fold
from dfq.ptq.pipeline import calibrate_and_round
from dfq.qat.parameter_groups import require_gradients
from dfq.quantization.calibration import calibrate, set_range
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.peak import PeakQuantizer
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.settings import Quantization
from dfq.recipe import shipped_recipes
from dfq.runtime.progress import Silent

PIXELS = (torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 255).byte()


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).mT
        return self.last(x + self.attention(x, x, x)[0])


def made() -> Toy:
    torch.manual_seed(0)
    return fold(Toy(Attending(), last=("last",)))


def quantizer_of(student: Toy) -> Quantizer:
    return student.module.get_submodule("attention.mix").left_quantizer


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_greatest_value_is_kept_and_levels_are_even(bits: int) -> None:
    scores = 6 * torch.randn(8, 50, generator=torch.Generator().manual_seed(bits))
    values = scores.softmax(1).flatten()
    quantizer = PeakQuantizer(bits)
    quantizer.fit(values)
    step = float(values.double().max()) / (2**bits - 1)
    # As many levels as the bits hold; a half may go either way.
    index = (values.double() / step).round().clamp(0, 2**bits - 1)
    torch.testing.assert_close(quantizer(values).double(), index * step, rtol=1e-5, atol=1e-7)
    assert float(quantizer(values).max()) == pytest.approx(float(values.max()), rel=1e-6)
    assert float(quantizer(torch.tensor([2.0]))) == pytest.approx(float(values.max()), rel=1e-6)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_it_is_the_greatest_of_the_set_and_no_search_or_training_moves_it(bits: int) -> None:
    section = Quantization(weight_bits=8, activation_bits=bits, softmax="peak")
    teacher, greatest = made(), []
    student = insert_quantizers(teacher.clone(), section.policy())
    quantizer = quantizer_of(student)
    assert isinstance(quantizer, PeakQuantizer)
    watch = quantizer.register_forward_pre_hook(lambda _m, x: greatest.append(float(x[0].max())))
    calibrate(student, [PIXELS.float() / 255])
    watch.remove()
    step = float(quantizer.scale)
    assert step == pytest.approx(max(greatest) / (2**bits - 1), rel=1e-6)
    student = insert_quantizers(teacher.clone(), section.policy())
    calibrate_and_round(student, teacher, PIXELS, section, Silent())
    assert float(quantizer_of(student).scale) == pytest.approx(step, rel=1e-6)
    require_gradients(student.module, (), zero_points=True)
    assert not any(p.requires_grad for p in quantizer_of(student).parameters())


def test_a_search_for_the_least_error_clips_what_it_keeps() -> None:
    # A few tokens are looked at, all others hardly: 3 bits are few for both.
    values = torch.cat([torch.full((4000,), 0.02), torch.linspace(0, 0.08, 4000), torch.ones(2)])
    peak = PeakQuantizer(3)
    peak.fit(values)
    plain = Quantizer(3, asymmetric=True)
    set_range(plain, values, "mse")
    assert float(peak(values).max()) == pytest.approx(1.0)
    assert float(plain(values).max()) < 0.5
    assert float((plain(values) - values).square().mean()) < float(
        (peak(values) - values).square().mean()
    )


def test_a_recipe_has_its_objective() -> None:
    assert Path(shipped_recipes()["ptq-apq"]).is_file()

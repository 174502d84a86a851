"""AdaQuant's weights, against its equation, and what is learned of a layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.toys import SIDE, Toy
from torch import Tensor, nn

from dfq.graph.fold_batchnorm import fold
from dfq.ptq.blocks import reconstruct
from dfq.ptq.continuous_weights import ContinuousWeight
from dfq.ptq.objectives import METHODS
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer


def test_it_is_the_equation_and_gradients_go_straight_through() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, moved = torch.randn(3, 5, generator=draw), torch.randn(3, 5, generator=draw)
    outer = torch.randn(3, 5, generator=draw)
    quantizer = Quantizer(3, channels=3, asymmetric=True)
    start, zeros = [0.2, 0.4, 0.7], [4, 3, 2]
    quantizer.initialise(torch.tensor(start), torch.tensor(zeros).float())
    learned = ContinuousWeight(quantizer, weight)
    torch.testing.assert_close(learned(weight), quantizer(weight))
    grown = [1.3 * s for s in start]
    with torch.no_grad():
        learned.variable.copy_(moved)
        quantizer.log_scale.add_(math.log(1.3))
    (learned(torch.zeros(3, 5)) * outer).sum().backward()
    assert learned.variable.grad is not None
    for row in range(3):
        for column in range(5):
            # V is in units of the step sizes at the start, whatever became of these.
            value = float(weight[row, column]) + start[row] * float(moved[row, column])
            steps = value / grown[row]
            level = min(max(math.floor(steps + 0.5), -zeros[row]), 7 - zeros[row])
            assert float(learned.rounded()[row, column]) == pytest.approx(
                grown[row] * level, rel=1e-5, abs=1e-6
            )
            inside = abs(level - steps) <= 0.5
            expected = float(outer[row, column]) * start[row] if inside else 0.0
            found = float(learned.variable.grad[row, column])
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


class One(nn.Module):
    """One convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, images: Tensor) -> Any:
        return self.conv(images)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_weights_scales_and_biases_of_a_layer_are_learned(asymmetric: bool) -> None:
    torch.manual_seed(3)
    teacher = fold(Toy(One()))
    images = (torch.rand(16, 3, SIDE, SIDE) * 255).byte()
    x = images.float() / 255
    grid = "asymmetric" if asymmetric else "symmetric"
    policy = Policy(3, 4, first_last_bits="same", weight_grid=grid)
    student = insert_quantizers(teacher.clone(), policy)
    calibrate(student, [x])
    layer, wanted = student.module.conv, teacher.raw(x)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    integers = layer.weight_quantizer.integers(layer.weight)

    @torch.no_grad()
    def error() -> float:
        return float((student.raw(x) - wanted).square().mean())

    nearest = error()
    reconstruct(student, teacher, images, METHODS["adaquant"], iterations=80, batch_size=4)
    assert error() < 0.7 * nearest
    assert student.module.conv.weight_quantizer is layer.weight_quantizer
    assert isinstance(layer.weight_quantizer, Quantizer)
    changed = {name for name, value in layer.state_dict().items() if not value.equal(before[name])}
    learned = {"weight", "bias", "weight_quantizer.log_scale", "input_quantizer.log_scale"}
    assert changed == learned
    torch.testing.assert_close(layer.weight_quantizer(layer.weight), layer.weight)
    assert not torch.equal(layer.weight_quantizer.integers(layer.weight), integers)
    assert not any(parameter.requires_grad for parameter in (layer.weight, layer.bias))

"""Damping and freezing against their definitions, on weights whose jumps are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import Blobs, Interrupt, assert_same, settings, state, student_of
from tiny_detector import tiny_detector
from torch import nn

from dfq.graph.fold_batchnorm import fold
from dfq.qat.oscillation import MOMENTUM, Oscillation
from dfq.qat.trainer import Trainer
from dfq.quantization.layers import QuantLinear
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.traversal import quantized_layers

STEP = 0.5


def layer(weights: list[float], bits: int = 3) -> QuantLinear:
    """One row of weights on a grid of -4 .. 3 halves."""
    quantizers = Quantizer(8), Quantizer(bits)
    made = QuantLinear.wrap(nn.Linear(len(weights), 1, bias=False), *quantizers)
    made.weight_quantizer.initialise(torch.tensor([STEP]))
    made.weight.data = torch.tensor([weights])
    return made


def test_damping_is_the_gradient_of_the_regularizer() -> None:
    made = layer([0.1, 0.2, 0.3, -0.9, 1.7, -2.9])
    made.weight.grad = torch.ones_like(made.weight)
    one = Oscillation(made, dampen=0.25, freeze=0)
    one.pull(0.0)
    assert made.weight.grad.eq(1).all(), "it begins at zero"
    one.pull(1 / 3)
    factor = 0.25 * 0.5 * (1 - math.cos(math.pi / 3))
    # Distances from 0, 0, 0.5, -1, and of the clipped values from the grid's ends: none.
    off = torch.tensor([[0.1, 0.2, -0.2, 0.1, 0.0, 0.0]])
    assert torch.allclose(made.weight.grad, 1 + 2 * factor * off, atol=1e-6)
    # The same from autograd, rounding taken as a constant.
    weight = made.weight.detach().clone().requires_grad_()
    rounded = (weight / STEP).round().clamp(-4, 3).detach() * STEP
    (factor * (weight.clamp(-4 * STEP, 3 * STEP) - rounded).square().sum()).backward()
    assert torch.allclose(made.weight.grad - 1, weight.grad, atol=1e-6)  # type: ignore[arg-type]


def test_what_jumps_back_and_forth_is_frozen_where_it_mostly_was() -> None:
    made = layer([0.1, 0.1, 0.1])
    one = Oscillation(made, dampen=0, freeze=0.2)
    frequency, frozen_at = 0.0, None
    for number in range(1, 60):
        # The first jumps every step (two of three times on level 0), the second wanders up one
        # way, the third stays.
        first = 0.3 if number % 3 == 0 else 0.1
        made.weight.data = torch.tensor([[first, 0.1 + 0.02 * number, 0.1]])
        before = one.weights[0].frozen.clone()
        one.hold(1.0)
        jumped_back = number > 3 and number % 3 in (0, 1)
        # Its very first jump has no direction to be against; the one after it has.
        jumped_back = jumped_back or number == 4
        if not before[0, 0]:
            frequency = frequency * (1 - MOMENTUM) + MOMENTUM * jumped_back
            assert float(one.weights[0].frequency[0, 0]) == pytest.approx(frequency, abs=1e-6)
        if one.weights[0].frozen[0, 0] and frozen_at is None:
            frozen_at = number
            assert frequency > 0.2
    assert frozen_at is not None
    assert one.weights[0].frozen.tolist() == [[True, False, False]]
    assert made.weight[0, 0].item() == 0, "level 0 is where it was two times of three"
    assert made.weight[0, 1].item() == pytest.approx(0.1 + 0.02 * 59)
    assert one.frozen_share() == pytest.approx(1 / 3)


def test_what_is_frozen_follows_its_step_size() -> None:
    made = layer([0.6, 0.1])
    one = Oscillation(made, dampen=0, freeze=0.01)
    one.weights[0].frequency[0, 0] = 1.0
    one.hold(1.0)
    made.weight_quantizer.initialise(torch.tensor([0.7]))
    made.weight.data += 5
    one.hold(1.0)
    assert float(made.weight[0, 0]) == pytest.approx(0.7)
    assert made.weight[0, 1].item() == pytest.approx(5.1)


def test_the_threshold_comes_down() -> None:
    for progress, expected in ((0.0, False), (1.0, True)):
        made = layer([0.1])
        one = Oscillation(made, dampen=0, freeze=0.1)
        one.weights[0].frequency[0, 0] = 0.2
        one.hold(progress)
        assert bool(one.weights[0].frozen[0, 0]) is expected


def trainer(folder: Path, **changes: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    teacher = fold(tiny_detector())
    chosen = settings(lr=5e-3, epochs=6, ema=0, **changes)
    return Trainer(student_of(teacher), teacher, Blobs(), chosen, seed=11, folder=folder)


def rounding_error(run: Trainer) -> float:
    """Mean distance of the weights from their levels, in steps; 0.25 for even chance."""
    errors = []
    for _, one in quantized_layers(run.student.module):
        scale = one.weight_quantizer.scale.view(-1, 1, 1, 1)
        qmin, qmax = one.weight_quantizer.bounds
        steps = (one.weight / scale).detach().clamp(qmin, qmax)
        errors.append((steps - steps.round()).abs().flatten())
    return float(torch.cat(errors).mean())


def test_damped_weights_end_nearer_to_their_levels(tmp_path: Path) -> None:
    plain, damped = trainer(tmp_path / "plain"), trainer(tmp_path / "damped", dampen=100.0)
    plain.train()
    outcome = damped.train()
    assert rounding_error(damped) < 0.8 * rounding_error(plain)
    assert outcome.divergence["last"] < 2 * outcome.divergence["start"]


def test_an_interrupted_training_freezes_the_same(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", freeze=0.01)
    expected = whole.train()
    assert 0 < whole.oscillation.frozen_share() < 0.5

    def stop(done: int, _total: int, _terms: dict[str, float]) -> None:
        if done == 4:
            raise Interrupt

    with pytest.raises(Interrupt):
        trainer(tmp_path / "broken", freeze=0.01).train(stop)
    resumed = trainer(tmp_path / "broken", freeze=0.01)
    assert resumed.train() == expected
    assert_same(state(resumed.student), state(whole.student))
    assert resumed.oscillation.frozen_share() == whole.oscillation.frozen_share()

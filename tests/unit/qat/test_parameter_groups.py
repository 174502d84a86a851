"""Integers of rounded weights are frozen while their step sizes are trained."""

from __future__ import annotations

import math

import torch
from torch import nn

from dfq.qat.frozen_integers import FrozenIntegers
from dfq.quantization.layers import QuantConv2d
from dfq.quantization.quantizers import Quantizer


def held_layer() -> QuantConv2d:
    torch.manual_seed(3)
    layer = QuantConv2d.wrap(
        nn.Conv2d(3, 4, 3), Quantizer(8, asymmetric=True), Quantizer(3, channels=4)
    )
    layer.weight_quantizer.initialise(layer.weight.detach().abs().flatten(1).amax(1) / 4)
    layer.input_quantizer.initialise(torch.tensor([0.01]))
    return layer


def test_held_integers_outlast_any_step_size_and_its_gradient_is_theirs() -> None:
    layer = held_layer()
    quantizer = layer.weight_quantizer
    integers = (layer.weight / quantizer.scale_of(layer.weight)).round().clamp(-4, 3).detach()
    frozen = FrozenIntegers([layer])
    with torch.no_grad():
        quantizer.log_scale.add_(torch.tensor([0.5, -0.5, 1.0, 0.0]))
    upstream = torch.randn(4, 3, 3, 3)
    weight = quantizer(layer.weight)
    weight.backward(upstream)
    scale = quantizer.scale.detach()
    torch.testing.assert_close(weight, integers * scale.view(-1, 1, 1, 1))
    # By way of the logarithm, and LSQ's factor.
    factor = 1 / math.sqrt(27 * 3)
    expected = (upstream * integers).sum((1, 2, 3)) * scale * factor
    torch.testing.assert_close(quantizer.log_scale.grad, expected)
    frozen.unfreeze()
    torch.testing.assert_close(quantizer(layer.weight), weight, rtol=1e-6, atol=1e-6)
    assert quantizer.levels is None


def test_states_of_held_layers_are_what_they_are_at_the_time() -> None:
    layer, other = held_layer(), held_layer()
    frozen = FrozenIntegers([layer]), FrozenIntegers([other])
    with torch.no_grad():
        layer.weight_quantizer.levels.neg_().clamp_(-4, 3)
        layer.weight_quantizer.log_scale.add_(0.7)
    x = torch.rand(2, 3, 8, 8)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    assert "weight_quantizer.levels" not in state
    plain = held_layer()
    for loaded in (other, plain):
        assert not torch.allclose(loaded(x), layer(x))
        loaded.load_state_dict(state)
        torch.testing.assert_close(loaded(x), layer(x))
    for one in frozen:
        one.unfreeze()
    torch.testing.assert_close(other(x), layer(x))

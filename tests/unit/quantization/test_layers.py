"""Quantized layers against the same operation on operands quantized by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.quantization.layers import QUANTIZED_LAYERS, QuantConv2d, QuantLinear
from dfq.quantization.quantizers import Quantizer

CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": (2, 1), "dilation": (2, 1)},
    {"groups": 4, "padding": "same"},
    {"padding": 1, "padding_mode": "reflect", "bias": False},
    {"padding": (1, 2), "padding_mode": "circular", "stride": (2, 1)},
    {"padding": 1, "padding_mode": "replicate", "groups": 2},
]


def quantizers(channels: int) -> tuple[Quantizer, Quantizer]:
    inputs, weights = Quantizer(5, asymmetric=True), Quantizer(3, channels=channels)
    inputs.initialise(torch.tensor([0.11]), torch.tensor([12.0]))
    weights.initialise(torch.linspace(0.02, 0.05, channels))
    return inputs, weights


def on_grid(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return torch.clamp(torch.round(x / scale), low, high) * scale


@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("per_channel", [True, False])
def test_convolution(arguments: dict[str, object], per_channel: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, **arguments)
    x = torch.randn(2, 4, 9, 10)
    plain, channels = layer(x), 8 if per_channel else 1
    quantized = QuantConv2d.wrap(layer, *quantizers(channels))
    assert quantized.weight is layer.weight
    assert quantized.bias is layer.bias
    assert quantized.extra_repr() == layer.extra_repr()

    by_hand = copy.deepcopy(layer)
    scale = torch.linspace(0.02, 0.05, channels).view(-1, 1, 1, 1)
    by_hand.weight.data = on_grid(layer.weight.data, scale, -4, 3)
    want = by_hand(on_grid(x, torch.tensor(0.11), -12, 19))
    torch.testing.assert_close(quantized(x), want)
    assert not torch.allclose(quantized(x), plain)

    for quantizer in (quantized.input_quantizer, quantized.weight_quantizer):
        quantizer.enabled = False
    assert torch.equal(quantized(x), plain)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=bias)
    quantized = QuantLinear.wrap(layer, *quantizers(4))
    x = torch.randn(2, 5, 6)
    weight = on_grid(layer.weight, torch.linspace(0.02, 0.05, 4)[:, None], -4, 3)
    want = F.linear(on_grid(x, torch.tensor(0.11), -12, 19), weight, layer.bias)
    torch.testing.assert_close(quantized(x), want)
    assert quantized.extra_repr() == layer.extra_repr()


def test_gradients_reach_weight_bias_and_all_step_sizes() -> None:
    quantized = QuantConv2d.wrap(nn.Conv2d(4, 8, 3), *quantizers(8))
    quantized(torch.randn(2, 4, 9, 9)).square().sum().backward()
    gradients = {name: p.grad for name, p in quantized.named_parameters() if p.requires_grad}
    assert set(gradients) == {
        "weight",
        "bias",
        "input_quantizer.log_scale",
        "input_quantizer.zero_point",
        "weight_quantizer.log_scale",
    }
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert (gradient != 0).any(), name


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3, padding=1), nn.Linear(4, 8)], ids=type)
def test_deep_copies_are_equal_and_apart(layer: nn.Module) -> None:
    wrap = QuantConv2d.wrap if isinstance(layer, nn.Conv2d) else QuantLinear.wrap
    layer.eval().requires_grad_(False)
    quantized = wrap(layer, *quantizers(8))
    assert not quantized.training
    twin = copy.deepcopy(quantized)
    assert isinstance(twin, QUANTIZED_LAYERS)
    x = torch.randn(2, 4, 4, 4)
    before = quantized(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.add_(1)
    assert not torch.equal(twin(x), before)
    assert torch.equal(quantized(x), before)


def test_state_dict_keeps_the_names_of_the_float_layer() -> None:
    layer = nn.Conv2d(4, 8, 3)
    names = set(QuantConv2d.wrap(layer, *quantizers(8)).state_dict())
    assert set(layer.state_dict()) <= names
    added = {"log_scale", "zero_point", "initialised"}
    expected = {f"{q}_quantizer.{name}" for q in ("input", "weight") for name in added}
    assert names - set(layer.state_dict()) == expected

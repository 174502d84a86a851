"""What a layer sees, as second moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from dfq.ptq.input_moments import MomentSums, columns, execution_order, inputs_of, place_count
from dfq.quantization.layers import QuantConv2d, QuantLinear
from dfq.quantization.quantizers import Quantizer


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1)},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
        {"kernel_size": 3, "padding": "same", "groups": 4},
        {"kernel_size": 2, "stride": 2, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_columns_times_weight_is_the_convolution(settings: dict[str, Any]) -> None:
    layer = nn.Conv2d(4, 8, **settings)
    x = torch.randn(3, 4, 9, 11)
    with torch.no_grad():
        expected = layer(x).permute(0, 2, 3, 1).reshape(-1, 8)
        assert place_count(layer, x) == len(expected)
        places = torch.randperm(len(expected))[:20]
        weight = layer.weight.reshape(layer.groups, 8 // layer.groups, -1)
        found = columns(layer, x, places) @ weight.mT
        found = found.permute(1, 0, 2).reshape(20, 8) + layer.bias
    torch.testing.assert_close(found, expected[places], rtol=1e-4, atol=1e-5)


def test_columns_of_a_linear_layer_are_its_rows() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(2, 7, 5)
    places = torch.tensor([3, 0, 13])
    assert place_count(layer, x) == 14
    torch.testing.assert_close(columns(layer, x, places), x.reshape(-1, 5)[places][None])


def passing(layer: nn.Module) -> Any:
    """A quantized layer whose input quantizer lets everything through."""
    inputs, weights = Quantizer(8, asymmetric=True), Quantizer(4)
    inputs.enabled = False
    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    return kind.wrap(layer, inputs, weights)  # type: ignore[attr-defined]


def test_moments_of_all_places_are_the_plain_averages() -> None:
    layer = passing(nn.Linear(4, 2))
    batches = [(torch.randn(9, 4), torch.randn(9, 4)) for _ in range(3)]
    # Near enough to be pairs.
    batches = [(x, x + 0.1 * noise + 0.3) for x, noise in batches]
    sums = MomentSums(layer, 27, 3, Generator().manual_seed(0))
    for x, y in batches:
        sums.add(x, y)
    found = sums.moments()
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    torch.testing.assert_close(found.hessian[0], x.T @ x / 27)
    torch.testing.assert_close(found.cross[0], y.T @ x / 27)
    torch.testing.assert_close(found.mean[0], x.mean(0))
    torch.testing.assert_close(found.float_mean[0], y.mean(0))
    centred = found.centred()
    torch.testing.assert_close(centred.hessian[0], torch.cov(x.T, correction=0))
    assert centred.mean.abs().max() == 0


@pytest.mark.parametrize("other", [torch.randn(50, 4), torch.randn(49, 4)])
def test_inputs_that_are_no_pairs_are_not_compared(other: Tensor) -> None:
    layer = passing(nn.Linear(4, 2))
    sums = MomentSums(layer, 50, 1, Generator().manual_seed(0))
    sums.add(torch.randn(50, 4), other)
    found = sums.moments()
    torch.testing.assert_close(found.cross, found.hessian)
    torch.testing.assert_close(found.float_mean, found.mean)


class Shared(nn.Module):
    """One layer on two inputs, as a head on the levels of a pyramid, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.late = passing(nn.Linear(3, 3))
        self.head = passing(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.head(x) + self.head(x + 1))


def test_order_and_calls_are_those_of_the_forward_pass() -> None:
    network, x = Shared(), torch.randn(2, 3)
    order = execution_order(network, lambda: network(x))
    assert list(order.items()) == [("head", 2), ("late", 1)]
    first, second = inputs_of(network.head, 2, lambda: network(x))
    torch.testing.assert_close(first, x)
    torch.testing.assert_close(second, x + 1)
    assert not network.head._forward_pre_hooks

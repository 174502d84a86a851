"""Ranges of channels are equalised across layers, and the network computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.toys import Residual, Toy, images
from torch import Tensor, nn

from dfq.graph.equalization import (
    equal_scale,
    equalize,
    input_ranges,
    output_ranges,
)
from dfq.graph.fold_batchnorm import FoldedBatchNorm, fold
from dfq.graph.links import links


def chain(*between: nn.Module, groups: int = 1, bias: bool = True) -> nn.Module:
    """Two layers with something between, the channels of the first of very different ranges."""
    torch.manual_seed(0)
    one = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
    one.weight.data *= torch.logspace(-2, 2, 8)[:, None, None, None]
    return nn.Sequential(one, *between, nn.Conv2d(8, 8, 3, padding=1, groups=groups))


class Normed(nn.Module):
    """BatchNorm with its own statistics between, and a depthwise layer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.1, 4)
        self.norm.weight.data.uniform_(0.01, 3)
        self.two, self.out = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.two(F.leaky_relu(self.norm(self.one(x)), 0.2)), inplace=True))


class Rows(nn.Module):
    """Linear layers that run twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(3, 16), nn.Linear(16, 5, bias=False)
        self.one.weight.data *= torch.logspace(-1, 1, 16)[:, None]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(2).mT
        return self.two(F.relu(self.one(rows))), self.two(F.relu(self.one(rows[:, ::2])))


EXACT: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str]]]] = {
    "nothing": (chain, [("0", "1")]),
    "relu": (lambda: chain(nn.ReLU()), [("0", "2")]),
    "relu in place": (lambda: chain(nn.ReLU(inplace=True), bias=False), [("0", "2")]),
    "leaky relu": (lambda: chain(nn.LeakyReLU(0.1)), [("0", "2")]),
    "two rectifiers": (lambda: chain(nn.LeakyReLU(0.1), nn.ReLU()), [("0", "3")]),
    "groups": (lambda: chain(nn.ReLU(), groups=4), [("0", "2")]),
    "normed": (Normed, [("one", "two"), ("two", "out")]),
    "rows": (Rows, [("one", "two")]),
}


def outputs(model: Toy) -> list[Tensor]:
    raw = model.raw(images(4) * 4 - 2)
    return list(raw) if isinstance(raw, tuple) else [raw]


@pytest.mark.parametrize("name", sorted(EXACT))
def test_the_function_stays_and_ranges_meet(name: str) -> None:
    make, pairs = EXACT[name]
    model = fold(Toy(make()))
    before = outputs(model)
    assert equalize(model) == pairs
    for got, wanted in zip(outputs(model), before, strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    for first, second in pairs:
        one, two = (model.module.get_submodule(each) for each in (first, second))
        torch.testing.assert_close(output_ranges(one), input_ranges(two), rtol=1e-3, atol=0)


def not_plain() -> nn.Module:
    """A layer that standardises its weight: scaled rows would come to nothing."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight / self.weight.flatten(1).std(1)[:, None, None, None]
            return self._conv_forward(x, weight, self.bias)

    torch.manual_seed(0)
    return nn.Sequential(Standardised(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))


class Kept(nn.Module):
    """What the first layer gives is also given by the network, or read by a function."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.how = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), how
        self.one.weight.data *= torch.logspace(-2, 2, 8)[:, None, None, None]

    def forward(self, x: Tensor) -> object:
        y = self.one(x)
        z = self.two(F.relu(y))
        if self.how == "given":
            return z, y
        if self.how == "in an object":
            return SimpleNamespace(z=z, features=[{"low": y}])
        if self.how == "added":
            return z + y
        if self.how == "a channel":
            return z, y[:, :1] * 2
        return z, F.conv2d(y, self.two.weight)


INEXACT: dict[str, Callable[[], nn.Module]] = {
    "silu": lambda: chain(nn.SiLU()),
    "relu6": lambda: chain(nn.ReLU6()),
    "gelu": lambda: chain(nn.GELU()),
    "sigmoid": lambda: chain(nn.Sigmoid()),
    "residual": lambda: Residual(nn.ReLU),
    "standardised": not_plain,
    **{
        how: (lambda how=how: Kept(how))
        for how in ("given", "in an object", "added", "a channel", "a function")
    },
}


@pytest.mark.parametrize("name", sorted(INEXACT))
def test_what_would_not_be_exact_stays(name: str) -> None:
    model = fold(Toy(INEXACT[name]()))
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    pairs = equalize(model)
    assert pairs == []
    for key, value in model.module.state_dict().items():
        assert torch.equal(value, before[key])


def test_layers_of_one_weight_stay() -> None:
    one, two, three = (nn.Conv2d(8, 8, 1) for _ in range(3))
    two.weight = one.weight
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), one, nn.ReLU(), two, nn.ReLU(), three)
    assert equalize(fold(Toy(network))) == []


def test_what_gives_the_predictions_stays() -> None:
    assert equalize(fold(Toy(chain(nn.ReLU()), last=("0",)))) == []


def test_channels_that_say_nothing_stay() -> None:
    first, second = torch.tensor([4.0, 0.0, 1e-9, 1.0]), torch.tensor([1.0, 1.0, 2.0, 0.0])
    assert equal_scale(first, second).tolist() == [2, 1, 1, 1]


def test_what_batchnorm_said_is_kept_in_step() -> None:
    """The folded BatchNorm goes on telling mean and spread of what the layer gives."""
    model = fold(Toy(Normed()))
    norm = model.module.norm
    assert isinstance(norm, FoldedBatchNorm)
    seen = images(4)
    before = model.module.one(seen)
    mean, spread = norm.shift.clone(), norm.factor * norm.var.sqrt()
    equalize(model)
    scale = before / model.module.one(seen)
    scale = scale.mean(dim=(0, 2, 3))
    assert (scale - 1).abs().max() > 0.1
    torch.testing.assert_close(norm.shift * scale, mean, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(norm.factor * norm.var.sqrt() * scale, spread, rtol=1e-3, atol=1e-5)


def test_links_know_rectifiers_and_batchnorm() -> None:
    model = fold(Toy(Normed()))
    found = links(model)
    assert found["one"].batchnorm is model.module.norm
    assert found["one"].sources == {None}
    assert found["two"].source == ("one", (0.2,))
    assert found["out"].source == ("two", (0.0,))
    assert found["out"].consumers == {""}

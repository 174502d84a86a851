"""Weights in half precision are made once, and give what autocast would."""

from __future__ import annotations

import torch
from support.tiny_detector import tiny_detector
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfq.synthesis.half_weights import cast_once


class Casts(TorchDispatchMode):
    """Counts what is made bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        half = (kwargs or {}).get("dtype") == torch.bfloat16
        self.count += func is torch.ops.aten._to_copy.default and half
        return func(*args, **(kwargs or {}))


def passed(network: nn.Module, images: Tensor) -> tuple[list[Tensor], int]:
    """What a network gives and the gradient of its input, and how much was cast for that."""
    x = images.clone().requires_grad_()
    with Casts() as casts:
        with torch.autocast("cpu", torch.bfloat16):
            out = network(x)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    return [out.detach(), gradient], casts.count


def test_values_are_those_of_autocast_with_fewer_casts() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, 5),
    ).requires_grad_(False)
    images = torch.rand(2, 3, 16, 16, generator=Generator().manual_seed(0))
    wanted, casts = passed(network, images)
    with cast_once(network):
        ours, fewer = passed(network, images)
        plain = network(images)
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b)
    # Three weights and two biases.
    assert casts - fewer == 5
    assert torch.equal(plain, network(images)), "in float32 all stays as it is"
    assert not any("forward" in vars(layer) for layer in network.modules())


def test_what_is_trained_is_left_alone() -> None:
    detector = tiny_detector()
    detector.module.requires_grad_(True)
    with cast_once(detector.module):
        assert not any("forward" in vars(layer) for layer in detector.module.modules())

"""Float inputs moved to where BatchNorm statistics are met."""

from __future__ import annotations

import torch
from torch import nn

from dfq.graph.fold_batchnorm import FoldedBatchNorm, fold_batchnorm
from dfq.ptq.block_io import Call
from dfq.ptq.distribution_correction import corrected, statistics_distance


def block() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU())
    norm = made[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(6) * 0.3)
        norm.running_var.copy_(torch.rand(6) + 0.5)
        norm.weight.copy_(torch.randn(6))
        norm.bias.copy_(torch.randn(6))
    return made.eval()


def test_the_distance_is_that_of_the_unfolded_batchnorms_input() -> None:
    made, x = block(), torch.randn(4, 3, 8, 8)
    norm = made[1]
    before = made[0](x).detach().double()
    flat = before.flatten(2)
    mean, deviation = flat.mean(2), (flat.var(2) + 1e-6).sqrt()
    expected = ((mean - norm.running_mean) ** 2).sum() / 4
    expected += ((deviation - (norm.running_var + 1e-6).sqrt()) ** 2).sum() / 4
    fold_batchnorm(made, lambda: made(x))
    folded = made[1]
    assert isinstance(folded, FoldedBatchNorm)
    found = statistics_distance(made[0](x).detach(), folded)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_inputs_come_closer_to_the_statistics_and_stay_near() -> None:
    made, x = block(), 0.3 * torch.randn(4, 3, 8, 8) + 1
    fold_batchnorm(made, lambda: made(x))
    norm = made[1]
    assert isinstance(norm, FoldedBatchNorm)
    moved = corrected(made, Call((x,), {})).args[0]
    before, after = (statistics_distance(made[0](t).detach(), norm) for t in (x, moved))
    assert after < before
    assert 0 < (moved - x).abs().max() < 0.3
    assert not moved.requires_grad


def test_a_block_without_batchnorm_is_left_as_it_is() -> None:
    call = Call((torch.randn(1, 3, 8, 8), "bilinear"), {"scale": 2})
    assert corrected(nn.Conv2d(3, 4, 1), call) is call

"""The gradient of the layers' divergences against autograd of the definition, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor, nn

from dfq.synthesis.losses.divergence import LEAST, Divergence, DivergenceConstants
from dfq.synthesis.losses.expected import Expected
from dfq.synthesis.moment_sums import Pass

CHANNELS, COUNT = (3, 5, 2), 40
RUNS = [2, 0]
"""Of the three layers, those that ran, in their order."""


def layers(generator: Generator) -> list[nn.BatchNorm2d]:
    made = []
    for channels in CHANNELS:
        layer = nn.BatchNorm2d(channels).double()
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(torch.randn(channels, generator=generator))
        layer.running_var.copy_(torch.rand(channels, generator=generator) + 0.1)
        made.append(layer)
    return made


def divergences(values: list[Tensor], known: list[nn.BatchNorm2d]) -> Tensor:
    """Of values `(count, channels)` by run: the definition, `(runs,)`."""
    found = []
    for run in RUNS:
        var, mean = torch.var_mean(values[run], 0, correction=0)
        expected, stored = known[run].running_mean, known[run].running_var
        assert expected is not None
        assert stored is not None
        ratio = (var / stored).clamp(min=LEAST)
        terms = ratio + (mean - expected).square() / stored - 1 - ratio.log()
        found.append(terms.mean() / 2)
    return torch.stack(found)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_the_definition(groups: int, normed: bool) -> None:
    generator = Generator().manual_seed(0)
    known = layers(generator)
    expected = Expected(known, relative=True, groups=groups)
    weights = torch.tensor([3.0, 0.5])
    batches, wanted = [], []
    for _ in range(groups):
        values = [torch.randn(COUNT, c, generator=generator).double() for c in CHANNELS]
        values[0][:, 1] = 0.25  # without variance
        batches.append([part.requires_grad_() for part in values])
        found = divergences(batches[-1], known) * weights
        wanted.append(torch.linalg.vector_norm(found) if normed else found)
    passed = Pass(expected)
    for group, values in enumerate(batches):
        for run, part in enumerate(values):
            mean, var = passed.channels(run, group)
            mean.copy_(part.mean(0).detach())
            var.copy_(part.var(0, correction=0).detach())
    passed.counts = [COUNT] * len(CHANNELS)
    constants = DivergenceConstants(expected, RUNS, tuple(passed.counts), weights)
    token = torch.empty(0, requires_grad=True)
    result = Divergence.apply(passed, passed, constants, normed, token)
    stacked = torch.stack(wanted) if groups > 1 else wanted[0]
    torch.testing.assert_close(result, stacked.detach(), rtol=1e-6, atol=1e-9)

    factors = torch.rand(stacked.shape, generator=generator).double()
    result.backward(factors)
    leaves = [values[run] for values in batches for run in RUNS]
    slopes = torch.autograd.grad((stacked * factors).sum(), leaves)
    expected_slopes = iter(slopes)
    for group, values in enumerate(batches):
        for run in RUNS:
            slope, offset = (v.view(groups, -1)[group] for v in passed.linear(run))
            ours = slope * values[run].detach() + offset
            torch.testing.assert_close(ours, next(expected_slopes), rtol=1e-5, atol=1e-9)
    assert not any(part.any() for part in passed.linear(1)), (
        "a layer that did not run has no gradient"
    )

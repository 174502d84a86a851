"""The Fisher information of blocks' outputs, against what is known of the distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.toys import SIDE, Toy
from torch import Generator, Tensor, nn

from dfq.models.base import DistillationPair
from dfq.ptq.fisher import DAMPING, fisher_diagonals, score


@pytest.mark.parametrize("kind", ["bernoulli", "categorical", "value"])
def test_scores_have_the_hessian_of_the_divergence_for_a_covariance(kind: Any) -> None:
    generator = Generator().manual_seed(0)
    logits = torch.tensor([1.0, -2.0, 0.5]).double().repeat(200_000, 1)
    weight = torch.tensor([[0.3]]).double()
    pair = DistillationPair("p", logits, logits, kind, dim=1, weight=weight)
    drawn = score(pair, generator)
    found = drawn.mT @ drawn / len(drawn)
    if kind == "bernoulli":
        p = logits[0].sigmoid()
        expected = torch.diag(p * (1 - p))
    elif kind == "categorical":
        p = logits[0].softmax(0)
        expected = torch.diag(p) - p[:, None] * p[None]
    else:
        expected = 2 * torch.eye(3).double()
    if kind == "value":
        # Independent signs.
        torch.testing.assert_close(found.diagonal(), 0.3 * expected.diagonal(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, 0.3 * expected, atol=3e-3, rtol=0)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.stem(x))


class Sigmoids(Toy):
    def distillation_pairs(self, student_raw: Any, teacher_raw: Any) -> Any:
        return [DistillationPair("p", student_raw, teacher_raw, "bernoulli")]


def test_channels_count_as_the_predictions_feel_them() -> None:
    torch.manual_seed(0)
    model = Sigmoids(Head())
    weight = torch.tensor([[2.0, 0.0, 1.0, -0.5], [0.0, 0.0, 1.0, 0.5]])
    with torch.no_grad():
        model.module.out.weight.copy_(weight[:, :, None, None])
    images = torch.rand(64, 3, SIDE, SIDE)
    (found,) = fisher_diagonals(model, ["stem"], [images])["stem"][0]
    probability = model.raw(images).sigmoid()
    curvature = probability * (1 - probability)
    exact = torch.einsum("nkhw,kc->nchw", curvature, weight.square())
    assert found.expand(64, 4, SIDE, SIDE).mean() == pytest.approx(1, rel=1e-3)
    channels = found.expand_as(exact).mean((0, 2, 3))
    # A mean of 1, damped.
    expected = (exact.mean((0, 2, 3)) / exact.mean() + DAMPING) / (1 + DAMPING)
    torch.testing.assert_close(channels, expected, atol=0.01, rtol=0.01)
    assert float(channels[1]) == pytest.approx(DAMPING / (1 + DAMPING))

"""Moments taken by compiled functions, and by PyTorch in their place, against the definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dfq.synthesis import compiled
from dfq.synthesis.moments import moments, moments_backward


@pytest.fixture(params=["compiled", "torch"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(compiled, "_library", lambda: None)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    drawn = 3 * torch.randn(shape, generator=Generator().manual_seed(seed)) + 1
    return drawn.to(dtype).contiguous(memory_format=torch.channels_last)


# Fewer channels than a vector has lanes, and neither they nor the rows a round number.
@pytest.mark.parametrize("shape", [(4, 3, 6, 6), (3, 16, 9, 5), (2, 70, 7, 3), (1, 5, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.usefixtures("_either")
def test_moments_and_their_gradient(shape: tuple[int, ...], dtype: torch.dtype, silu: bool) -> None:
    x, grad = values(shape, dtype, 0), values(shape, dtype, 1)
    channels = shape[1]
    slope, offset = torch.randn(2, channels, generator=Generator().manual_seed(2))
    mean, var = torch.empty(channels), torch.empty(channels)
    out = moments(x, torch.full((channels,), 0.5), mean, var, silu)
    back = moments_backward(x, grad, slope, offset, silu)

    exact = x.double().requires_grad_()
    expected_var, expected_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), expected_var, rtol=1e-4, atol=1e-5)
    activated = F.silu(exact) if silu else exact
    # Rounding to bfloat16 leaves 8 bits; PyTorch's way rounds in between.
    bits = (
        {"rtol": 2**-7, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    torch.testing.assert_close(out.double(), activated, **bits)
    (through,) = torch.autograd.grad(activated, exact, grad.double())
    linear = slope.double()[:, None, None] * exact + offset.double()[:, None, None]
    bits["atol"] *= 4
    torch.testing.assert_close(back.double(), (through + linear).detach(), **bits)


def test_what_is_not_finite_stays_so() -> None:
    for bad in (float("nan"), float("inf")):
        x = values((2, 4, 4, 4), torch.bfloat16, 0)
        x[0, 1, 2, 2] = bad
        mean, var = torch.zeros(4), torch.zeros(4)
        out = moments(x, torch.zeros(4), mean, var, True)
        assert torch.isfinite(mean).tolist() == [True, False, True, True]
        torch.testing.assert_close(out, F.silu(x), rtol=2**-7, atol=0, equal_nan=True)

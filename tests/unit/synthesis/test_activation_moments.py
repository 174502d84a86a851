"""Moments taken by compiled functions, and by PyTorch in their place, against the definitions."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfq.kernels import loader as compiled
from dfq.kernels.batchnorm import (
    grouped_moments_backward,
    moments,
    moments_backward,
    silu_with_moments,
    silu_with_moments_backward,
)


@pytest.fixture(params=["compiled", "torch"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(compiled, "_library", lambda: None)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    drawn = 3 * torch.randn(shape, generator=Generator().manual_seed(seed)) + 1
    return drawn.to(dtype).contiguous(memory_format=torch.channels_last)


# Fewer channels than a vector has lanes, and neither they nor the rows a round number; rows that
# are taken several at a time; and too many channels for that.
@pytest.mark.parametrize(
    "shape",
    [(4, 3, 6, 6), (3, 16, 9, 5), (2, 70, 7, 3), (1, 5, 1, 1), (2, 80, 4, 4), (1, 5001, 2, 2)],
)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_either")
def test_activations_of_large_values(dtype: torch.dtype) -> None:
    sizes = torch.tensor([0.0, 1e-30, 1e-3, 20, 86.9, 87.1, 88, 90, 200, 1e6, 1e15, 1e30])
    x = torch.cat([sizes, -sizes]).to(dtype)[None, :, None, None]
    x = x.repeat(1, 1, 4, 4).contiguous(memory_format=torch.channels_last)
    zeros = torch.zeros(x.shape[1])
    exact = x.double().requires_grad_()
    activated = F.silu(exact)
    (through,) = torch.autograd.grad(activated.sum(), exact)
    out = moments(x, zeros, zeros.clone(), zeros.clone(), True)
    back = moments_backward(x, torch.ones_like(x), zeros, zeros, True)
    # Far below zero next to nothing is left, of values however large.
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), activated.detach(), rtol=rtol, atol=1e-6)
    torch.testing.assert_close(back.double(), through, rtol=rtol, atol=1e-6)


INTERPRETED = """
import torch
from support.tiny_detector import tiny_detector

from dfq.graph.fold_batchnorm import fold
from dfq.kernels import batchnorm as moments
from dfq.kernels import fused, fused_pixels
from dfq.synthesis.losses.batchnorm import BatchNormStatistics

detector = fold(tiny_detector())
detector.module.requires_grad_(False)
detector.module.to(memory_format=torch.channels_last)
images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
for kernels in (fused, fused_pixels):
    assert kernels.why_not(torch.device("cpu")) is None
found = []
for kernels in (None, fused):
    moments._fused = lambda device, kernels=kernels: kernels
    for groups in (1, 2):
        statistics = BatchNormStatistics(detector.module, lambda: detector.raw(images[:1]))
        statistics.groups = groups
        leaf = images.clone(memory_format=torch.channels_last).requires_grad_()
        with statistics:
            raw = detector.levels(detector.raw(leaf))
            divergences = statistics.divergences()
        assert divergences.numel() == groups * len(statistics.layers)
        loss = divergences.sum() + sum(level.mean() for level in raw)
        found.append((divergences, torch.autograd.grad(loss, leaf)[0]))
for plain, ours in zip(found[:2], found[2:]):
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-3, atol=1e-5)
    assert float((ours[1] - plain[1]).norm() / plain[1].norm()) < 1e-3
print("alike")
"""


@pytest.mark.e2e
def test_kernels_for_a_gpu_give_the_same() -> None:
    # What interprets them on a CPU has to be asked for before they are defined.
    pytest.importorskip("triton", reason="kernels for a GPU need Triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("alike\n"), done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(3, 8, 5, 7), (2, 48, 4, 4), (1, 64, 1, 6), (2, 1, 1, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_gradient_is_taken_as_it_lies(
    shape: tuple[int, ...], silu: bool, dtype: torch.dtype, groups: int
) -> None:
    generator = Generator().manual_seed(0)
    count, channels, *sides = shape
    x, both = (
        torch.randn(groups * count, width, *sides, generator=generator)
        .to(dtype, memory_format=torch.channels_last)
        for width in (channels, channels + 5)
    )  # fmt: skip
    # Of one of two parts of a concatenation, and of one that was laid out in planes.
    parts = both[:, 5:], both[:, :channels].contiguous()
    slope, offset = torch.randn(2, groups, channels, generator=generator)
    if groups == 1:
        slope, offset = slope[0], offset[0]
    for part in parts:
        dense = part.contiguous(memory_format=torch.channels_last)
        wanted = grouped_moments_backward(x, dense, slope, offset, silu)
        assert torch.equal(grouped_moments_backward(x, part, slope, offset, silu), wanted)


class Watching(TorchDispatchMode):
    """Sees operations, and leaves them as they are."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.skipif(compiled.why_none() is not None, reason="there is no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_address_the_result_is_the_operations(dtype: torch.dtype) -> None:
    x, both = values((3, 16, 9, 5), dtype, 0), values((3, 21, 9, 5), dtype, 1)
    expected, slope, offset = torch.randn(3, 16, generator=Generator().manual_seed(2))
    *ours, mean, var = torch.full((4, 16), 9.0)
    out = silu_with_moments(x, *addresses(expected, *ours))
    assert out is not None
    assert torch.equal(out, moments(x, expected, mean, var, True))
    assert torch.equal(torch.stack(ours), torch.stack([mean, var]))
    for grad in (both[:, 5:], both[:, :16].contiguous(memory_format=torch.channels_last)):
        back = silu_with_moments_backward(x, grad, *addresses(slope, offset))
        assert back is not None
        assert torch.equal(back, moments_backward(x, grad, slope, offset, True))


def test_by_address_nothing_is_done_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = values((3, 16, 9, 5), torch.bfloat16, 0), values((3, 16, 9, 5), torch.bfloat16, 1)
    # In planes; of three dimensions; of another type than the gradient; gradients that lie so.
    for other in (x.contiguous(), x[..., 0], x.double()):
        assert silu_with_moments(other, 0, 0, 0) is None
        assert silu_with_moments_backward(other, grad, 0, 0) is None
    for other in (grad.contiguous(), grad.float()):
        assert silu_with_moments_backward(x, other, 0, 0) is None
    with Watching():
        assert silu_with_moments(x, 0, 0, 0) is None
        assert silu_with_moments_backward(x, grad, 0, 0) is None
    monkeypatch.setattr(compiled, "_library", lambda: None)
    assert silu_with_moments(x, 0, 0, 0) is None
    assert silu_with_moments_backward(x, grad, 0, 0) is None

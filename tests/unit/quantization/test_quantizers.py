"""Fake quantization against the formulas of LSQ and LSQ+, element by element, and PyTorch's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from dfq.quantization.quantizers import Quantizer, fake_quantize, grid

KINDS = [
    pytest.param(bits, channels, asymmetric, id=f"{bits}bit-{channels}ch-{name}")
    for bits in (2, 4, 8)
    for channels in (1, 5)
    for asymmetric, name in ((False, "symmetric"), (True, "asymmetric"))
]


def by_the_formulas(
    x: list[float], grad: list[float], scale: float, zero_point: float, qmin: int, qmax: int
) -> tuple[list[float], list[float], float, float]:
    """Output, and the gradients of x, scale and zero point, one element after the other."""
    zero = min(max(round(zero_point), qmin), qmax)
    low, high = qmin - zero, qmax - zero
    output, grad_x, grad_scale, grad_zero = [], [], 0.0, 0.0
    for value, upstream in zip(x, grad, strict=True):
        level = round(value / scale)
        if level < low:
            output.append(scale * low)
            grad_x.append(0.0)
            grad_scale += upstream * low
            grad_zero += upstream * -scale
        elif level > high:
            output.append(scale * high)
            grad_x.append(0.0)
            grad_scale += upstream * high
            grad_zero += upstream * -scale
        else:
            output.append(scale * level)
            grad_x.append(upstream)
            grad_scale += upstream * (level - value / scale)
    return output, grad_x, grad_scale, grad_zero


def case(
    bits: int, channels: int, asymmetric: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x `(5, 3, 7)`, its upstream gradient, scale, zero point), with clipping on both sides."""
    generator = torch.Generator().manual_seed(bits * 10 + channels)
    qmin, qmax = grid(bits, signed=not asymmetric)
    scale = 0.05 + torch.rand(channels, generator=generator, dtype=torch.float64)
    zero = torch.zeros(channels, dtype=torch.float64)
    if asymmetric:
        zero = 0.2 + (qmax - 0.7) * torch.rand(channels, generator=generator, dtype=torch.float64)
    levels = (qmin - zero.round()).reshape(-1, 1) + (qmax - qmin) * (
        1.6 * torch.rand(5, 21, generator=generator, dtype=torch.float64) - 0.3
    )
    # Away from ties and from the edges, where single and double precision may part.
    fraction = levels - levels.floor()
    levels = torch.where((fraction - 0.5).abs() < 0.02, levels + 0.1, levels)
    x = (levels * scale.reshape(-1, 1)).reshape(5, 3, 7)
    upstream = torch.randn(5, 3, 7, generator=generator, dtype=torch.float64)
    return x.to(dtype), upstream.to(dtype), scale.to(dtype), zero.to(dtype)


def ours(
    x: Tensor, upstream: Tensor, scale: Tensor, zero: Tensor, bounds: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of `fake_quantize`, scale and zero point given as `(channels,)`."""
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero)]
    shape = (-1, 1, 1) if len(scale) > 1 else (1,)
    output = fake_quantize(leaves[0], leaves[1].view(shape), leaves[2].view(shape), *bounds)
    output.backward(upstream)
    gradients = [leaf.grad for leaf in leaves]
    assert all(g is not None for g in gradients)
    return (output.detach(), *gradients)


@pytest.mark.parametrize(("bits", "channels", "asymmetric"), KINDS)
def test_values_and_gradients_follow_the_formulas(
    bits: int, channels: int, asymmetric: bool
) -> None:
    x, upstream, scale, zero = case(bits, channels, asymmetric)
    bounds = grid(bits, signed=not asymmetric)
    output, grad_x, grad_scale, grad_zero = ours(x, upstream, scale, zero, bounds)
    rows, grads = x.reshape(channels, -1), upstream.reshape(channels, -1)
    clipped = 0
    for channel in range(channels):
        want = by_the_formulas(
            rows[channel].tolist(),
            grads[channel].tolist(),
            float(scale[channel]),
            float(zero[channel]),
            *bounds,
        )
        clipped += want[1].count(0.0)
        assert output.reshape(channels, -1)[channel].tolist() == pytest.approx(want[0], abs=1e-12)
        assert grad_x.reshape(channels, -1)[channel].tolist() == want[1]
        assert float(grad_scale[channel]) == pytest.approx(want[2], rel=1e-9, abs=1e-9)
        assert float(grad_zero[channel]) == pytest.approx(want[3], rel=1e-9, abs=1e-9)
    assert 10 < clipped < 95  # both branches were taken


@pytest.mark.parametrize(("bits", "channels", "asymmetric"), KINDS)
def test_agrees_with_the_kernels_of_pytorch(bits: int, channels: int, asymmetric: bool) -> None:
    x, upstream, scale, zero = case(bits, channels, asymmetric, torch.float32)
    qmin, qmax = grid(bits, signed=not asymmetric)
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero)]
    if channels > 1:
        output = torch._fake_quantize_learnable_per_channel_affine(*leaves, 0, qmin, qmax, 1.0)
    else:
        output = torch._fake_quantize_learnable_per_tensor_affine(*leaves, qmin, qmax, 1.0)
    output.backward(upstream)
    theirs = (output.detach(), *(leaf.grad for leaf in leaves))
    for a, b in zip(ours(x, upstream, scale, zero, (qmin, qmax)), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("zero", "low", "high"), [(0, -8, 7), (-8, 0, 15), (3, -11, 4)])
def test_lsq_clips_what_is_beyond_the_ends_before_it_is_rounded(
    zero: int, low: int, high: int
) -> None:
    """LSQ eq. 3 and its gradient of v, element by element: also at the ends, and within the half
    step beyond them. Levels `low` to `high`, counted from the zero point."""
    step = 0.25  # A power of two: values lie on the ends exactly.
    near = [low - 0.7, low - 0.3, low, low + 0.3, high - 0.3, high, high + 0.3, high + 0.7]
    ratios = [*near, *(low - 2 + 0.487 * k for k in range(41))]
    x = torch.tensor(ratios, dtype=torch.float64).mul(step).requires_grad_()
    scale = torch.tensor([step], dtype=torch.float64, requires_grad=True)
    point = torch.tensor([zero], dtype=torch.float64)
    upstream = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    output = fake_quantize(x, scale, point, -8, 7, strict=True)
    output.backward(upstream)
    assert x.grad is not None
    assert scale.grad is not None
    of_step = 0.0
    rows = zip(upstream.tolist(), output.tolist(), x.grad.tolist(), ratios, strict=True)
    for grad, got, of_value, ratio in rows:
        inside = low < ratio < high
        assert got == step * min(max(round(ratio), low), high)
        assert of_value == (grad if inside else 0)
        of_step += grad * (round(ratio) - ratio if inside else low if ratio <= low else high)
    assert float(scale.grad) == pytest.approx(of_step, rel=1e-9)


def test_symmetric_grid_of_what_is_never_below_zero() -> None:
    """LSQ: Q_n = 0, Q_p = 2^b - 1, in the gradient scale too."""
    quantizer = Quantizer(4, unsigned=True)
    quantizer.initialise(torch.tensor([0.1]), torch.tensor([-8.0]))
    x = torch.linspace(-1.003, 3.004, 389)
    levels = (quantizer(x) / 0.1).round()
    assert levels.unique().tolist() == list(range(16))
    quantizer(x).sum().backward()
    want = by_the_formulas(x.tolist(), [1.0] * len(x), 0.1, -8, -8, 7)[2]
    assert quantizer.log_scale.grad is not None
    factor = 1 / math.sqrt(len(x) * 15)
    assert float(quantizer.log_scale.grad) == pytest.approx(want * factor * 0.1, rel=1e-3)
    assert quantizer.zero_point.grad is None


@pytest.mark.parametrize("layout", ["channels_last", "gaps", "one gradient for all"])
def test_the_layout_in_memory_does_not_matter(layout: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = 3 * torch.randn(4, 6, 5, 7, generator=generator, dtype=torch.float64)
    upstream = torch.randn(4, 6, 5, 7, generator=generator, dtype=torch.float64)
    if layout == "one gradient for all":
        upstream = torch.ones(1, 1, 1, 1, dtype=torch.float64).expand(4, 6, 5, 7)
    scale, zero = torch.tensor([0.3]).double(), torch.tensor([6.2]).double()
    expected = ours(x, upstream.contiguous(), scale, zero, (0, 15))
    if layout == "channels_last":
        x, upstream = (t.contiguous(memory_format=torch.channels_last) for t in (x, upstream))
    if layout == "gaps":
        wide = torch.zeros(4, 12, 5, 7, dtype=torch.float64)
        wide[:, ::2] = x
        x = wide[:, ::2]
    for a, b in zip(ours(x, upstream, scale, zero, (0, 15)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    # One in another layout than the other.
    mixed = ours(x.contiguous(memory_format=torch.channels_last), upstream, scale, zero, (0, 15))
    for a, b in zip(mixed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_no_value_within_the_grid_counts_as_clipped() -> None:
    """In single precision q * s is off by some units in the last place: more, the larger q."""
    scale = torch.tensor([0.0137])
    levels = torch.arange(-127, 127).float() + 0.5
    near_ties = torch.cat([levels * scale * (1 + k * 1e-7) for k in (-2, -1, 0, 1, 2)])
    x = near_ties.requires_grad_()
    fake_quantize(x, scale, torch.zeros(1), -128, 127).sum().backward()
    assert x.grad is not None
    assert (x.grad == 1).all()


def test_zero_point_is_clamped_to_the_grid_in_the_forward_pass() -> None:
    x = torch.linspace(-3, 3, 50)
    for outside, edge in ((-4.0, 0.0), (99.0, 15.0)):
        got = fake_quantize(x, torch.tensor([0.1]), torch.tensor([outside]), 0, 15)
        want = fake_quantize(x, torch.tensor([0.1]), torch.tensor([edge]), 0, 15)
        assert torch.equal(got, want)


@pytest.mark.parametrize(("bits", "channels", "asymmetric"), KINDS)
def test_gradient_scale(bits: int, channels: int, asymmetric: bool) -> None:
    """LSQ eq. 5: 1 / sqrt(N * Q_p); the step is learned as a logarithm: d s / d log s = s."""
    x, upstream, scale, zero = case(bits, channels, asymmetric, torch.float32)
    quantizer = Quantizer(bits, channels=channels, asymmetric=asymmetric)
    quantizer.initialise(scale, zero)
    quantizer(x).backward(upstream)
    bounds = grid(bits, signed=not asymmetric)
    _, _, grad_scale, grad_zero = ours(x, upstream, scale, zero, bounds)
    top = 2**bits - 1 if asymmetric else 2 ** (bits - 1) - 1
    factor = 1 / math.sqrt(x.numel() / channels * top)
    assert quantizer.log_scale.grad is not None
    torch.testing.assert_close(quantizer.log_scale.grad, grad_scale * scale * factor)
    if asymmetric:
        assert quantizer.zero_point.grad is not None
        torch.testing.assert_close(quantizer.zero_point.grad, grad_zero * factor)
    else:
        assert quantizer.zero_point.grad is None


@pytest.mark.parametrize("rate", [30.0, 1e3, 1e30])
def test_scale_stays_positive_and_finite_whatever_the_optimizer_does(rate: float) -> None:
    x = torch.randn(4, 16, requires_grad=True)
    for direction in (-1.0, 1.0):
        quantizer = Quantizer(4, channels=4)
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=rate)
        quantizer.log_scale.grad = torch.full((4,), direction)
        optimizer.step()
        assert (quantizer.scale > 0).all()
        assert quantizer.scale.isfinite().all()
        output = quantizer(x)
        assert output.isfinite().all()
        for gradient in torch.autograd.grad(output.sum(), [x, quantizer.log_scale]):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_number_of_levels_and_exact_zero(bits: int, asymmetric: bool) -> None:
    quantizer = Quantizer(bits, asymmetric=asymmetric)
    scale = 0.37
    # 0.45: a real zero point that is no integer must not move real zero off the grid.
    quantizer.initialise(torch.tensor([scale]), torch.tensor([0.45 * 2**bits if asymmetric else 0]))
    x = torch.linspace(-2 * scale * 2**bits, 2 * scale * 2**bits, 50_001)
    levels = quantizer(x).detach().unique()
    assert len(levels) == 2**bits
    assert 0.0 in levels.tolist()
    torch.testing.assert_close(levels.diff(), torch.full((2**bits - 1,), scale))
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))


def test_quantizing_twice_is_quantizing_once() -> None:
    quantizer = Quantizer(8, asymmetric=True)
    quantizer.initialise(torch.tensor([0.013]), torch.tensor([31.0]))
    once = quantizer(torch.randn(1000))
    assert torch.equal(quantizer(once), once)


def test_per_channel_is_per_tensor_channel_by_channel() -> None:
    x, scale = torch.randn(3, 4, 2, 2), torch.tensor([0.1, 0.3, 0.9])
    together = Quantizer(4, channels=3)
    together.initialise(scale)
    for channel in range(3):
        alone = Quantizer(4)
        alone.initialise(scale[channel : channel + 1])
        assert torch.equal(together(x)[channel], alone(x[channel]))


def test_disabled_lets_everything_through() -> None:
    quantizer, x = Quantizer(2), torch.randn(9)
    quantizer.enabled = False
    assert quantizer(x) is x


def test_state_dict_round_trip() -> None:
    first = Quantizer(4, channels=3, asymmetric=True)
    assert not first.initialised
    first.initialise(torch.tensor([0.1, 0.2, 1e-30]), torch.tensor([1.0, 2.5, 15.0]))
    state = copy.deepcopy(first.state_dict())
    assert set(state) == {"log_scale", "zero_point", "initialised"}
    second = Quantizer(4, channels=3, asymmetric=True)
    second.load_state_dict(state)
    assert bool(second.initialised)
    x = torch.randn(3, 50)
    assert torch.equal(first(x), second(x))
    torch.testing.assert_close(second.scale.detach(), torch.tensor([0.1, 0.2, 1e-30]))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_held_levels_are_those_it_would_round_to(asymmetric: bool) -> None:
    quantizer = Quantizer(3, channels=4, asymmetric=asymmetric)
    zero = torch.tensor([0.0, 2.4, 5.0, 7.0]) if asymmetric else None
    quantizer.initialise(torch.tensor([0.1, 0.3, 0.2, 0.4]), zero)
    x = torch.linspace(-4, 4, 90).expand(4, 90)
    rounded = quantizer(x).detach()
    quantizer.freeze_integers(x)
    assert quantizer.levels is not None
    torch.testing.assert_close(quantizer(x).detach(), rounded)
    least, largest = quantizer.limits_of(x)
    assert torch.equal(largest - least, torch.full((4, 1), 7.0))
    for values, end in ((quantizer.levels.amin(1), least), (quantizer.levels.amax(1), largest)):
        torch.testing.assert_close(values, end[:, 0])
    if asymmetric:
        assert least[:, 0].tolist() == [0, -2, -5, -7]
    quantizer(x).sum().backward()
    assert quantizer.zero_point.grad is None


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32])
def test_impossible_bit_widths_are_rejected(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 16"):
        Quantizer(bits)


def test_only_what_is_learned_wants_gradients() -> None:
    assert Quantizer(4).log_scale.requires_grad
    assert not Quantizer(4).zero_point.requires_grad
    assert Quantizer(4, asymmetric=True).zero_point.requires_grad


def test_levels_are_found_in_float32_whatever_comes_in() -> None:
    quantizer = Quantizer(8, asymmetric=True)
    quantizer.initialise(torch.tensor([0.0217]), torch.tensor([3.0]))
    x = torch.linspace(-0.1, 5.5, 4001).bfloat16()
    assert torch.equal(quantizer(x), quantizer(x.float()))

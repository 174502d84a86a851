"""Range searches against the error they claim to minimise."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from dfq.quantization.quantizers import fake_quantize, grid
from dfq.quantization.range_search import (
    SEARCHES,
    cosine_distance,
    lsq,
    lsq_step,
    minmax,
    mse,
    percentile,
    three_deviations,
)


def quantized(values: Tensor, found: tuple[Tensor, Tensor], bits: int, asymmetric: bool) -> Tensor:
    scale, zero = found
    return fake_quantize(values, scale[:, None], zero[:, None], *grid(bits, signed=not asymmetric))


def error(values: Tensor, found: tuple[Tensor, Tensor], bits: int, asymmetric: bool) -> Tensor:
    """Mean squared error of each channel."""
    return (quantized(values, found, bits, asymmetric) - values).square().mean(dim=1)


def heavy_tailed(kind: str) -> Tensor:
    """Four channels of 4,000 values."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(4, 4000, generator=generator)
    if kind == "laplace":
        signs = torch.randn(4, 4000, generator=generator).sign()
        return signs * torch.empty(4, 4000).exponential_(generator=generator)
    if kind == "student":  # three degrees of freedom
        return normal / (torch.randn(3, 4, 4000, generator=generator) ** 2).mean(0).sqrt()
    if kind == "outlier":  # one value two hundred standard deviations out
        normal[:, 0] = 200
        return normal
    return torch.nn.functional.silu(4 * normal)


@pytest.mark.parametrize("kind", ["laplace", "student", "outlier", "silu"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_mse_has_the_least_error(kind: str, bits: int, asymmetric: bool) -> None:
    values = heavy_tailed(kind)
    best = error(values, mse(values, bits, asymmetric=asymmetric), bits, asymmetric)
    # LSQ+'s goes on from this search.
    for other in (minmax, percentile) if asymmetric else (minmax, percentile, lsq):
        found = other(values, bits, asymmetric=asymmetric)
        # The search has 80 steps: on tails that long its best may lie a little beside the optimum.
        slack = 1 if other is minmax else 1.005
        assert (best <= error(values, found, bits, asymmetric) * slack).all(), other.__name__


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_near_the_optimum_of_a_dense_scan(bits: int) -> None:
    values = heavy_tailed("laplace")[:1]
    found = float(error(values, mse(values, bits, asymmetric=False), bits, False))
    x = values.double()
    errors = []
    for bound in torch.linspace(0.02, 1.0, 1500).tolist():
        step = bound * float(x.abs().max()) / (2 ** (bits - 1) - 1)
        level = (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        errors.append(float((level * step - x).square().mean()))
    assert 0.999 * min(errors) <= found <= 1.02 * min(errors)


def test_mse_reaches_the_published_distortion_of_a_gaussian() -> None:
    """0.01154 with 16 uniform levels (Max 1960, table II). His lie symmetric about zero; ours hold
    zero, and one more below it than above, which loses a little."""
    values = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    found = float(error(values, mse(values, 4, asymmetric=False), 4, False))
    assert 0.99 * 0.01154 < found < 1.05 * 0.01154


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("name", ["minmax", "mse"])
def test_data_on_a_grid_stays_as_it_is(name: str, bits: int, asymmetric: bool) -> None:
    qmin, qmax = grid(bits, signed=not asymmetric)
    levels = torch.arange(qmin, qmax + 1).float()
    if asymmetric:
        levels = levels - 2 ** (bits - 1) + 1
    values = torch.stack([0.03 * levels, 2.7 * levels])
    found = SEARCHES[name](values, bits, asymmetric=asymmetric)
    torch.testing.assert_close(found[0], torch.tensor([0.03, 2.7]))
    torch.testing.assert_close(quantized(values, found, bits, asymmetric), values)


@pytest.mark.parametrize("name", sorted(SEARCHES))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_channels_do_not_see_each_other(name: str, asymmetric: bool) -> None:
    values = heavy_tailed("student") * torch.tensor([[1e-4], [1.0], [30.0], [1e4]])
    together = SEARCHES[name](values, 4, asymmetric=asymmetric)
    for channel in range(4):
        alone = SEARCHES[name](values[channel : channel + 1], 4, asymmetric=asymmetric)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[channel : channel + 1], b)


@pytest.mark.parametrize("name", sorted(SEARCHES))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_scales_are_positive_and_zero_points_whole(name: str, asymmetric: bool) -> None:
    """Also of a channel that is all zero, or all on one side of it."""
    values = torch.stack(
        [torch.zeros(64), torch.rand(64) + 1, -1 - torch.rand(64), torch.randn(64)]
    )
    scale, zero = SEARCHES[name](values, 4, asymmetric=asymmetric)
    qmin, qmax = grid(4, signed=not asymmetric)
    assert scale.shape == zero.shape == (4,)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert torch.equal(zero, zero.round().clamp(qmin, qmax))
    output = quantized(values, (scale, zero), 4, asymmetric)
    assert (output[0] == 0).all()
    assert (output[1] > 0).any()
    assert (output[2] < 0).any()
    if not asymmetric:
        assert (zero == 0).all()


@pytest.mark.parametrize("search", [minmax, percentile, mse])
def test_silu_keeps_its_minimum_within_a_step(search: object) -> None:
    values = torch.nn.functional.silu(3 * torch.randn(1, 20_000))
    assert callable(search)
    scale, zero = search(values, 8, asymmetric=True)
    lowest = float(quantized(values, (scale, zero), 8, True).min())
    assert lowest < 0
    assert abs(lowest - float(values.min())) <= float(scale)


def test_minmax_by_hand() -> None:
    values = torch.tensor([[-1.0, 0.5, 2.0], [0.5, 1.0, 1.5], [-8.0, 1.0, 7.0]])
    scale, zero = minmax(values, 4, asymmetric=True)
    assert scale.tolist() == pytest.approx([3 / 15, 1.5 / 15, 15 / 15])
    assert zero.tolist() == [5, 0, 8]
    scale, _ = minmax(values, 4, asymmetric=False)
    assert scale.tolist() == pytest.approx([2 / 7, 1.5 / 7, 1.0])


def test_lsq_by_hand() -> None:
    """LSQ section 2.1: 2 <|v|> / sqrt(Q_p)."""
    values = torch.tensor([[-1.0, 3.0, 0.0, 4.0]])
    scale, _ = lsq(values, 4, asymmetric=False)
    assert float(scale) == pytest.approx(2 * 2 / 7**0.5)
    scale, zero = lsq_step(values.clamp_min(0), 255)
    assert float(scale) == pytest.approx(2 * 1.75 / 255**0.5)
    assert float(zero) == 0


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["student", "silu", "tail"])
def test_lsq_plus_has_the_least_squares_over_step_and_offset(kind: str, bits: int) -> None:
    """Against every zero point and a dense scan of steps, in double precision."""
    if kind == "tail":
        # Few values far below zero: an offset that spans them by LSQ's step has no level above 0.
        generator = torch.Generator().manual_seed(5)
        values = torch.randn(1, 2000, generator=generator).abs()
        values[0, :10] = -12 - torch.rand(10, generator=generator)
    else:
        values = heavy_tailed(kind)[:1, ::2]
    scale, zero = lsq(values, bits, asymmetric=True)
    assert torch.equal(zero, zero.round().clamp(0, 2**bits - 1))
    x = values[0].double()
    reach = float(x.max() - x.min().clamp_max(0))
    steps = torch.linspace(0.005, 1, 400, dtype=torch.float64)[:, None] * reach / (2**bits - 1)

    def least(steps: Tensor, zero: int) -> float:
        levels = (x / steps).round().clamp(-zero, 2**bits - 1 - zero)
        return float((levels * steps - x).square().mean(dim=1).min())

    optimum = min(least(steps, z) for z in range(2**bits))
    assert least(scale.double()[:, None], int(zero)) <= 1.01 * optimum
    if kind == "tail":
        assert (quantized(values, (scale, zero), bits, True)[values > 1] > 0).any()


def test_lsq_plus_takes_weights_for_three_deviations() -> None:
    """max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b - 1), by Python's own statistics."""
    rows = [[0.3, -1.2, 0.7, 0.1], [-2.0, -2.5, -1.5, -2.1], [0.0] * 4]
    scale, zero = three_deviations(torch.tensor(rows), 4, asymmetric=False)
    for row, got in zip(rows[:2], scale.tolist(), strict=False):
        mean, deviation = statistics.fmean(row), statistics.pstdev(row)
        ends = abs(mean - 3 * deviation), abs(mean + 3 * deviation)
        assert got == pytest.approx(max(ends) / 8, rel=1e-5)
    assert float(scale[2]) == 1
    assert not zero.any()


def test_percentile_leaves_out_the_tails() -> None:
    values = torch.linspace(-1, 1, 100_001)[None].clone()
    values[0, 0], values[0, -1] = -50, 80
    scale, _ = percentile(values, 8, asymmetric=False)
    assert float(scale) == pytest.approx(1 / 127, rel=1e-3)


def test_errors_count_as_they_come_through_the_reader() -> None:
    """In front of a SiLU, what is far below zero may be clipped for finer steps above."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 5000, generator=generator) * 3 - 4

    def behind(found: tuple[Tensor, Tensor]) -> float:
        got = quantized(values, found, 4, asymmetric=True)
        return float((silu(got) - silu(values)).square().mean())

    plain, aware = mse(values, 4, asymmetric=True), mse(values, 4, asymmetric=True, through=silu)
    assert behind(aware) < 0.5 * behind(plain)
    assert aware[0] < plain[0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("name", ["mse", "cosine"])
def test_local_searches_choose_as_brute_force_in_double_precision(
    name: str, bits: int, asymmetric: bool
) -> None:
    """Every pair of bounds between full range and nothing, of each of three channels."""
    values = heavy_tailed("silu")[:3, :500] * torch.tensor([[1e-3], [1.0], [500.0]])
    found = SEARCHES[name](values, bits, asymmetric=asymmetric)
    for channel, row in enumerate(values.double()):

        def distance(scale: float, zero: int, x: Tensor = row) -> float:
            least, most = (0, 2**bits - 1) if asymmetric else (-(2 ** (bits - 1)), 0)
            most = most or 2 ** (bits - 1) - 1
            got = ((x / scale).round() + zero).clamp(least, most).sub(zero) * scale
            if name == "mse":
                return float(((got - x) ** 2).mean())
            norms = float(got.norm() * x.norm())
            return 1 - float(got @ x) / norms if norms else 1.0

        low, high = float(row.min()), float(row.max())
        best = float("inf")
        for step in range(80):
            top = high * (80 - step) / 80
            for share in (1, 0.8, 0.6, 0.4, 0.2, 0) if asymmetric else (None,):
                if share is None:
                    bottom = low * (80 - step) / 80
                    scale = max(top / (2 ** (bits - 1) - 1), -bottom / 2 ** (bits - 1))
                    zero = 0
                else:
                    scale = (top - low * share) / (2**bits - 1)
                    zero = round(-low * share / scale)
                best = min(best, distance(scale, zero))
        chosen = distance(float(found[0][channel].double()), int(found[1][channel]))
        # What is chosen in single precision may be beside it by what that cannot tell apart.
        assert chosen <= best * (1 + 1e-4) + 1e-9


def test_cosine_looks_at_direction_alone() -> None:
    """Levels that are all too short by one factor have no distance, but an error."""
    wanted = torch.tensor([[1.0, 2.0, -3.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    got = torch.tensor([[0.5, 1.0, -1.5], [1.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    torch.testing.assert_close(cosine_distance(got, wanted), torch.tensor([0.0, 1.0, 1.0]))
    # Nearly parallel: a billionth, which 1 less a cosine of single precision does not have.
    near = torch.tensor([[1.0, 4.4721e-5]])
    torch.testing.assert_close(
        cosine_distance(near, torch.tensor([[1.0, 0.0]])),
        torch.tensor([1.0e-9]),
        rtol=1e-3,
        atol=0,
    )

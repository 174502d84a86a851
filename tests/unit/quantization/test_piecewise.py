"""Piecewise grids of weights: the equation, the breakpoint, files, and what refuses them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_detector import blobs, tiny_detector

from dfq.api.export import export
from dfq.errors import UserError
from dfq.graph.fold_batchnorm import fold
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.piecewise import PiecewiseQuantizer
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.range_search import mse
from dfq.quantization.storage import restore_state, stored_state
from dfq.quantization.traversal import quantized_layers
from dfq.recipe import load_recipe


def levels(p: float, m: float, bits: int) -> tuple[list[float], list[float]]:
    """Magnitudes of both regions, in float64: half of them fine, the last half step of which is
    before p, half of them from p to m."""
    half = 2 ** (bits - 2)
    return (
        [k * p / (half - 0.5) for k in range(half)],
        [p + k * (m - p) / (half - 1) for k in range(half)],
    )


def by_hand(w: float, p: float, m: float, bits: int) -> float:
    fine, coarse = levels(p, m, bits)
    nearest = min(fine if abs(w) < p else coarse, key=lambda level: abs(abs(w) - level))
    return math.copysign(nearest, w)


def heavy(channels: int, count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    normal = torch.randn(channels, count, generator=draw)
    return normal * (0.2 + torch.randn(channels, count, generator=draw).square())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_get_the_nearest_level_of_their_region(bits: int) -> None:
    rows = heavy(3, 60)
    quantizer = PiecewiseQuantizer(bits, channels=3)
    quantizer.search(rows)
    found, codes = quantizer(rows), quantizer.integers(rows)
    most = 2 ** (bits - 1) - 1
    assert float(codes.abs().amax()) == most
    for channel in range(3):
        p, m = float(quantizer.breakpoint[channel]), float(rows[channel].abs().amax())
        for w, value in zip(rows[channel].tolist(), found[channel].tolist(), strict=True):
            assert value == pytest.approx(by_hand(w, p, m, bits), rel=1e-5, abs=1e-6)
    # Levels are met again, and integers count them from the lowest to the highest.
    assert torch.equal(quantizer(found), found)
    counted = torch.arange(-most, most + 1.0).expand(3, -1)
    values = quantizer.values(counted)
    assert bool((values.diff(dim=1) > 0).all())
    assert torch.equal(quantizer.integers(values), counted)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_breakpoint_has_the_least_squared_error(bits: int) -> None:
    rows = heavy(2, 80)
    quantizer = PiecewiseQuantizer(bits, channels=2)
    quantizer.search(rows)
    for channel, row in enumerate(rows.double().tolist()):
        m = max(map(abs, row))
        errors = [
            sum((w - by_hand(w, share / 100 * m, m, bits)) ** 2 for w in row)
            for share in range(1, 100)
        ]
        chosen = round(100 * float(quantizer.breakpoint[channel]) / m)
        assert errors[chosen - 1] == pytest.approx(min(errors), rel=1e-4)


def test_for_a_gaussian_the_breakpoint_is_the_papers() -> None:
    """The expected error is, up to a factor, (2 F(p) - 1) p^2 + 2 (1 - F(p)) (m - p)^2."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 60_000, generator=draw)
    m = float(rows.abs().amax())
    quantizer = PiecewiseQuantizer(8)
    # In other units: what is found is in them.
    quantizer.search(0.02 * rows)
    p = float(quantizer.breakpoint) / 0.02

    def expected(point: float) -> float:
        inside = math.erf(point / math.sqrt(2))
        return inside * point**2 + (1 - inside) * (m - point) ** 2

    best = min(expected(point) for point in np.linspace(0.01 * m, 0.99 * m, 4000))
    assert expected(p) < 1.01 * best
    assert p == pytest.approx(math.log(0.8614 * m + 0.6079), abs=0.15)


def test_long_tails_lose_less_than_on_an_even_grid() -> None:
    rows = heavy(4, 2000)
    piecewise, even = PiecewiseQuantizer(4, channels=4), Quantizer(4, channels=4, asymmetric=True)
    piecewise.search(rows)
    even.initialise(*mse(rows, 4, asymmetric=True))
    errors = [float((q(rows).detach() - rows).square().mean()) for q in (piecewise, even)]
    assert errors[0] < 0.95 * errors[1], errors


def test_gradients_go_straight_through_and_steps_have_none() -> None:
    weights = heavy(2, 8).requires_grad_()
    quantizer = PiecewiseQuantizer(3, channels=2)
    quantizer.search(weights.detach())
    quantizer(weights).mul(torch.arange(8.0)).sum().backward()
    assert weights.grad is not None
    assert torch.equal(weights.grad, torch.arange(8.0).expand(2, 8))
    assert not any(parameter.requires_grad for parameter in [quantizer.log_scale])


@pytest.mark.parametrize("scales", ["per_channel", "per_tensor"])
def test_a_file_holds_the_integers_and_gives_the_same_weights(scales: str) -> None:
    policy = Policy(3, 8, weight_grid="piecewise", weights=scales)
    teacher = fold(tiny_detector())
    student = insert_quantizers(teacher.clone(), policy)
    calibrate(student, [blobs(2)])
    for _, layer in quantized_layers(student.module):
        assert isinstance(layer.weight_quantizer, PiecewiseQuantizer)
        with torch.no_grad():
            layer.weight.copy_(layer.weight_quantizer(layer.weight))
    state = stored_state(student.module)
    twin = insert_quantizers(teacher.clone(), policy)
    restore_state(twin.module, state, "a test")
    packed = 0
    for (name, layer), (_, other) in zip(
        quantized_layers(student.module), quantized_layers(twin.module), strict=True
    ):
        assert torch.equal(layer.weight, other.weight), name
        if layer.weight_quantizer.bits == 3:
            packed += 1
            assert state[f"{name}.weight"].numel() == -(-3 * layer.weight.numel() // 8)
    assert packed > 5
    assert torch.equal(student.raw(blobs(1))[0], twin.raw(blobs(1))[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["method=auto", "quantization.reconstruction=none"], "set method: ptq"),
        (["method=ptq"], "reconstruction: none"),
        (["method=ptq", "quantization.reconstruction=qdrop"], "that qdrop does not know"),
        (
            ["method=ptq", "quantization.reconstruction=none", "quantization.placement=qdq"],
            "in no file for a runtime",
        ),
        (
            ["method=ptq", "quantization.reconstruction=none", "quantization.weight_bits=2"],
            "3 bits or more .* not 2",
        ),
        (
            ["method=ptq", "quantization.reconstruction=none", 'quantization.overrides={"a*": 2}'],
            "3 bits or more .* not 2",
        ),
    ],
)
def test_recipes_that_it_does_not_go_with_are_one_line(changes: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        load_recipe(None, ["quantization.weight_grid=piecewise", *changes])
    assert "\n" not in str(refused.value)


def test_two_bits_are_refused_wherever_they_come_from() -> None:
    with pytest.raises(UserError, match="3 bits or more"):
        PiecewiseQuantizer(2).search(heavy(1, 8))


def test_export_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(8, 8, weight_grid="piecewise")
    student = insert_quantizers(fold(tiny_detector()), policy)
    monkeypatch.setattr("dfq.api.export.is_run", lambda _: True)
    monkeypatch.setattr("dfq.api.export.check_run", lambda _: {"policy": policy.to_dict()})
    monkeypatch.setattr("dfq.api.export.load_model", lambda *_, **__: student)
    monkeypatch.setattr("dfq.api.export.require_weights", lambda _: None)
    with pytest.raises(UserError, match="its weights are on piecewise grids") as refused:
        export(tmp_path / "run", tmp_path / "run.onnx")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run.onnx").exists()

"""Grids of activations are moved to where the predictions stay closest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor

from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Detector
from dfq.models.divergence import total_divergence
from dfq.ptq import activation_refinement
from dfq.ptq.activation_refinement import (
    candidates,
    half_with_contrast,
    narrow_activations,
    refine_grids,
)
from dfq.quantization.calibration import calibrate, set_range
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.range_search import mse
from dfq.quantization.traversal import activation_quantizers, quantized_layers


def images(count: int, seed: int) -> Tensor:
    return (blobs(count, seed=seed) * 255).byte()


def calibrated(teacher: Detector, **policy: Any) -> Detector:
    """A student whose activations alone are quantized."""
    chosen = Policy(**{"weight_bits": 8, "activation_bits": 5, "first_last_bits": 8, **policy})
    student = insert_quantizers(teacher.clone(), chosen)
    calibrate(student, [images(12, 1).float() / 255])
    for _, layer in quantized_layers(student.module):
        layer.weight_quantizer.enabled = False
    return student


def grids(student: Detector) -> dict[str, tuple[float, float]]:
    return {
        name: (q.scale.item(), q.zero_point.item())
        for name, q in activation_quantizers(student.module)
    }


@pytest.mark.parametrize("activations", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [5, 6])
def test_predictions_come_closer(
    activations: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = fold(tiny_detector().clone())
    student = calibrated(teacher, activations=activations, activation_bits=bits)
    for _, quantizer in activation_quantizers(student.module):
        quantizer.enabled = quantizer.bits == bits
    seen = images(16, 1)
    before, start = total_divergence(student, teacher, [seen]), grids(student)
    told: list[tuple[int, int]] = []
    # These drawn images have all the contrast there can be.
    monkeypatch.setattr(activation_refinement, "CONTRAST", 1.0)
    refine_grids(student, teacher, seen, progress=lambda *done: told.append(done))
    after = total_divergence(student, teacher, [seen])
    if after == before:
        assert grids(student) == start, "not closer: all as it was"
        return
    assert after < before
    narrow = [name for name, _ in narrow_activations(student)]
    assert told[-1] == (len(narrow), len(narrow))
    moved = [name for name, grid in grids(student).items() if grid != start[name]]
    assert moved
    assert set(moved) <= set(narrow)
    for _, quantizer in activation_quantizers(student.module):
        assert quantizer.enabled == (quantizer.bits == bits)


def test_what_is_finished_is_not_computed_again_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = fold(tiny_detector().clone())
    found = []
    for blocks in (teacher.blocks(), []):
        student = calibrated(teacher)
        monkeypatch.setattr(student, "blocks", lambda blocks=blocks: blocks)
        refine_grids(student, teacher, images(4, 1))
        found.append(grids(student))
    assert found[0] == found[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_four_and_eight_bits_stay_as_they_are(bits: int) -> None:
    teacher = fold(tiny_detector().clone())
    student = calibrated(teacher, activation_bits=bits)
    before = grids(student)
    refine_grids(student, teacher, images(4, 1))
    assert grids(student) == before


def test_what_a_silu_leaves_below_zero_is_among_what_is_tried() -> None:
    # Large values make the grid of least squares so coarse that nothing is left below zero.
    values = F.silu(torch.cat([torch.linspace(-6, 3, 4000), torch.linspace(3, 9, 100)]))
    quantizer = Quantizer(4, asymmetric=True)
    quantizer.initialise(*mse(values[None], 4, asymmetric=True))
    assert quantizer.zero_point.item() == 0
    tried = candidates(quantizer, values)
    torch.testing.assert_close(tried[0][0], quantizer.scale)
    assert any(zero >= 1 for _, zero in tried)
    assert len({(float(scale), float(zero)) for scale, zero in tried}) == len(tried)
    # None is so fine that it cuts off many of the large values.
    assert all(scale * 15 > 5 for scale, _ in tried)


def test_symmetric_grids_have_no_zero_points_to_try() -> None:
    quantizer = Quantizer(4)
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    quantizer.initialise(*mse(values[None], 4, asymmetric=False))
    tried = candidates(quantizer, values)
    assert len(tried) > 2
    assert all(zero == 0 for _, zero in tried)
    # Nor has one with all its levels above zero.
    above = Quantizer(6, unsigned=True)
    set_range(above, values.abs(), "mse")
    assert {int(zero) for _, zero in candidates(above, values.abs())} == {-32}


def test_contrast_of_every_second_image() -> None:
    pixels = torch.rand(5, 3, 8, 8) * 0.4 + 0.3
    result = half_with_contrast(pixels, 1.5)
    assert torch.equal(result[::2], pixels[::2])
    torch.testing.assert_close(result[1::2].mean((1, 2, 3)), pixels[1::2].mean((1, 2, 3)))
    torch.testing.assert_close(result[1::2].std(), 1.5 * pixels[1::2].std(), rtol=0.05, atol=0)
    assert half_with_contrast(torch.rand(2, 3, 8, 8), 4.0).aminmax() == (0, 1)

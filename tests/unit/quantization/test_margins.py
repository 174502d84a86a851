"""Ranges that hold on other images than those of the calibration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor, nn

from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Detector
from dfq.quantization import margins
from dfq.quantization.calibration import calibrate, run_observers
from dfq.quantization.implied import implied_ranges
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.margins import keep_within_statistics, span, usual_contrast, with_contrast
from dfq.quantization.policy import Policy
from dfq.quantization.traversal import activation_quantizers


def student(bits: int = 8, seed: int = 0) -> Detector:
    return insert_quantizers(fold(tiny_detector(seed)), Policy(8, bits, first_last_bits="same"))


def pixels(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def ends(detector: Detector) -> dict[str, tuple[float, float]]:
    return {
        name: (float(span(q)[0]), float(span(q)[1]))
        for name, q in activation_quantizers(detector.module)
    }


def calibrated(bits: int, images: Tensor) -> Detector:
    detector = student(bits)
    calibrate(detector, [images])
    return detector


@pytest.mark.parametrize("folded", [False, True])
def test_ranges_follow_from_scale_and_shift(folded: bool) -> None:
    plain = tiny_detector()
    norm = plain.module.model[0].bn
    spread = norm.weight * (norm.running_var / (norm.running_var + norm.eps)).sqrt()
    reach = torch.stack([norm.bias - 4 * spread, norm.bias + 4 * spread])
    # SiLU falls to -0.278 in between.
    detector = insert_quantizers(fold(plain) if folded else plain, Policy(8, 8))
    low, high = implied_ranges(detector, 4.0)["model.1.conv"]
    assert high == pytest.approx(float(F.silu(reach[1].max())), rel=1e-4)
    assert low == pytest.approx(-0.278, abs=0.02)


def test_what_no_batchnorm_is_behind_is_left_out() -> None:
    plain = tiny_detector()
    # The second layer's output is then anything.
    plain.module.model[1].bn = nn.Identity()
    detector = insert_quantizers(plain, Policy(8, 8))
    names = [name for name, _ in activation_quantizers(detector.module)]
    found = implied_ranges(detector, 4.0)
    assert "model.1.conv" in found
    assert "model.2.conv" in names
    assert "model.2.conv" not in found
    # And the one after the next BatchNorm is known again.
    assert "model.3.cv1.conv" in found


def test_grids_reach_as_far_as_channels_do() -> None:
    # Nearly flat images, that show next to nothing of what the layers give.
    flat = 0.5 + 0.02 * (blobs(8) - 0.5)
    before = calibrated(8, flat)
    least = implied_ranges(before, margins.LEAST)
    start = ends(before)
    keep_within_statistics(before, pixels(flat))
    found = ends(before)
    assert any(start[name][1] < 0.7 * least[name][1] for name in least)
    for name, (low, high) in least.items():
        step = (found[name][1] - found[name][0]) / 255
        assert found[name][1] >= high - step
        assert found[name][0] <= low + step


def test_what_a_layer_gives_reaches_as_far_as_the_batchnorm_behind_it() -> None:
    """A grid between a layer and its activation function clips before any grid behind that does."""
    flat = 0.5 + 0.02 * (blobs(8) - 0.5)
    teacher = fold(tiny_detector())
    policy = Policy(8, 8, first_last_bits="same", placement="qdq", runtime="onnxruntime")
    detector = insert_quantizers(teacher, policy)
    calibrate(detector, [flat])
    least = implied_ranges(detector, margins.LEAST)
    norm = tiny_detector().module.model[0].bn
    spread = 4 * norm.weight * (norm.running_var / (norm.running_var + norm.eps)).sqrt()
    low, high = least["model.0.conv.output_quantizer"]
    assert low == pytest.approx(float((norm.bias - spread).min()), rel=1e-4)
    assert high == pytest.approx(float((norm.bias + spread).max()), rel=1e-4)
    # Those of the predictions have no BatchNorm.
    outputs = {f"{name}.output_quantizer" for name in detector.boundary_layers().last}
    assert not outputs & least.keys()
    keep_within_statistics(detector, pixels(flat))
    found, quantizers = ends(detector), dict(activation_quantizers(detector.module))
    for name in ("model.0.conv.output_quantizer", "model.2.conv.output_quantizer"):
        step = (found[name][1] - found[name][0]) / 255
        assert found[name][1] >= least[name][1] - step
        # What SiLU makes nothing of takes no levels.
        assert quantizers[name].consumer == "silu"
        assert found[name][0] >= -7 - step


@pytest.mark.parametrize(("growth", "clipped"), [(1e9, True), (0.0, False)])
def test_values_beyond_any_gaussian_are_clipped_where_contrast_does_not_make_them(
    growth: float, clipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(margins, "GROWTH", growth)
    images = blobs(8)
    detector = calibrated(8, images)
    most = implied_ranges(detector, margins.MOST)
    name = list(most)[-1]
    quantizer = dict(activation_quantizers(detector.module))[name]
    wide = 10 * most[name][1]
    quantizer.initialise(torch.tensor([wide / 255]), torch.zeros(1))
    keep_within_statistics(detector, pixels(images))
    expected = most[name][1] if clipped else wide
    assert ends(detector)[name][1] == pytest.approx(expected, rel=0.02)


def test_early_activations_grow_with_the_contrast() -> None:
    images = blobs(8)
    detector = calibrated(8, images)
    plain = run_observers(detector, [images])["model.1.conv"]
    strong = run_observers(detector, [with_contrast(images, margins.CONTRAST)])["model.1.conv"]
    assert margins._reach(strong) > margins.GROWTH * margins._reach(plain)
    assert margins._reach(torch.arange(1001.0)) == pytest.approx(1000, abs=1)


@pytest.mark.parametrize("bits", [4, 6])
def test_narrow_grids_stay(bits: int) -> None:
    flat = 0.5 + 0.02 * (blobs(8) - 0.5)
    detector = calibrated(bits, flat)
    before = ends(detector)
    keep_within_statistics(detector, pixels(flat))
    assert ends(detector) == before


def test_pale_images_are_given_the_contrast_of_photographs() -> None:
    pale = 0.5 + 0.35 * (blobs(8) - 0.5)
    factor = usual_contrast(pale)
    assert float(with_contrast(pale, factor).std((1, 2, 3)).mean()) == pytest.approx(0.2, rel=0.05)
    assert usual_contrast(blobs(8) * 2 - 0.5) == 1
    detector, without = calibrated(8, pale), calibrated(8, pale)
    keep_within_statistics(detector, pixels(pale))
    old = margins.USUAL
    margins.USUAL = 0.0
    try:
        keep_within_statistics(without, pixels(pale))
    finally:
        margins.USUAL = old
    ours, theirs = ends(detector), ends(without)
    # But for the zero point's place on the grid.
    assert all(ours[name][1] >= 0.99 * theirs[name][1] for name in ours)
    assert sum(ours[name][1] > 1.1 * theirs[name][1] for name in ours) >= 1

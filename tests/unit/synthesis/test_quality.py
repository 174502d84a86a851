"""What a set says of itself, without a real image."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor

from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Detector
from dfq.synthesis.quality import Quality, quality_of, set_quality


@pytest.fixture(scope="module")
def detector() -> Detector:
    return tiny_detector()


def pixels(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def quality(detector: Detector, images: Tensor, **settings: int) -> Quality:
    found = set_quality(detector, pixels(images), **settings)
    assert found is not None
    return found


def test_the_training_images_themselves_are_met(detector: Detector) -> None:
    found = quality(detector, blobs(16))
    assert found.worst_shift < 0.02
    # Their variance in training had one degree of freedom less.
    assert found.worst_log_variance < 0.05
    assert found.warnings() == []


def test_parts_and_folding_change_nothing(detector: Detector) -> None:
    images = blobs(10, seed=3)
    whole = quality(detector, images, batch_size=10)
    for other in (
        quality(detector, images, batch_size=3),
        quality(fold(detector.clone()), images),
    ):
        assert [layer.name for layer in other.layers] == [layer.name for layer in whole.layers]
        for ours, theirs in zip(other.layers, whole.layers, strict=True):
            assert ours.shift == pytest.approx(theirs.shift, abs=2e-3)
            assert ours.log_variance == pytest.approx(theirs.log_variance, abs=2e-3)


def test_too_little_contrast_is_too_little_variance(detector: Detector) -> None:
    images = blobs(16)
    mean = images.mean((0, 2, 3), keepdim=True)
    images = pixels(mean + 0.5 * (images - mean)).float() / 255
    first = detector.module.model[0]
    with torch.no_grad():
        seen = first.conv(images).var((0, 2, 3), correction=0)
    expected = float((seen / first.bn.running_var).log().mean())
    found = quality(detector, images)
    assert found.first.log_variance == pytest.approx(expected, abs=1e-3)
    # A quarter, but for the borders, where zeros stand beside the image.
    assert math.log(0.25) < expected < math.log(0.5)
    assert found.first.shift < 0.05
    (line, *_rest) = found.warnings()
    assert "too little" in line
    assert "contrast" in line
    assert found.first.name in line


def test_other_light_is_a_shift(detector: Detector) -> None:
    found = quality(detector, 0.5 * blobs(16) + 0.5)
    assert found.first.shift > 0.3
    assert found.warnings()
    assert found.worst(3)[0].off >= found.worst(3)[2].off


def test_it_is_kept_in_a_manifest(detector: Detector) -> None:
    found = quality(detector, blobs(4))
    assert quality_of({"quality": found.to_dict()}) == found
    for broken in ({}, {"quality": None}, {"quality": {"layers": [], "images": 3}}, {"quality": 3}):
        assert quality_of(broken) is None


def test_no_batchnorm_no_figures(detector: Detector) -> None:
    bare = detector.clone()
    for module in list(bare.module.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, name, torch.nn.Identity())
    assert set_quality(bare, pixels(blobs(2))) is None
    assert set_quality(detector, pixels(blobs(2))[:0]) is None

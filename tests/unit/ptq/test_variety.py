"""Copies in other colours, and what rounding gains by them."""

from __future__ import annotations

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector
from support.toys import Toy
from torch import Tensor, nn

from dfq.graph.fold_batchnorm import fold
from dfq.ptq import pipeline
from dfq.ptq.gptq import gptq_quantize
from dfq.ptq.variety import SHARE, copies, sees_other_worlds, with_variety
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.traversal import activation_quantizers
from dfq.recipe import load_recipe
from dfq.runtime.progress import Silent


def grey(count: int, seed: int = 0) -> Tensor:
    """uint8 `(count, 3, 32, 32)` without colour."""
    generator = torch.Generator().manual_seed(seed)
    light = torch.rand(count, 1, 8, 8, generator=generator)
    light = nn.functional.interpolate(light, scale_factor=4, mode="bilinear")
    return (255 * (0.3 + 0.4 * light)).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize(("images", "added"), [(1, 1), (4, 1), (5, 2), (64, 16)])
def test_a_quarter_has_copies(images: int, added: int) -> None:
    whole = grey(images)
    seen = with_variety(whole)
    assert copies(images) == added
    assert seen.shape == (images + added, 3, 32, 32)
    assert seen.dtype == torch.uint8
    assert torch.equal(seen[:images], whole)
    assert torch.equal(seen, with_variety(whole))


def test_copies_differ_in_colour_contrast_and_light() -> None:
    count = 16 * SHARE
    copied = with_variety(grey(count))[count:].float() / 255
    colour = (copied - copied.mean(dim=1, keepdim=True)).flatten(1).std(dim=1)
    assert float(colour.median()) > 0.05
    contrast = copied.mean(dim=1).flatten(1).std(dim=1)
    assert float(contrast.max()) > 3 * float(contrast.min())
    assert float(copied.flatten(1).mean(dim=1).std()) > 0.1


def test_rounding_lets_no_error_go_where_a_set_has_nothing() -> None:
    """A layer that has seen no colour, on images that have some."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Toy(nn.Sequential(nn.Conv2d(3, 256, 3)))
        coloured = torch.rand(8, 3, 32, 32)
    policy = Policy(weight_bits=4, activation_bits=8, first_last_bits="same")

    def error(images: Tensor) -> float:
        student = insert_quantizers(teacher.clone(), policy)
        calibrate(student, [coloured])
        gptq_quantize(student, teacher, images)
        for _, quantizer in activation_quantizers(student.module):
            quantizer.enabled = False
        with torch.no_grad():
            off = student.module(coloured) - teacher.module(coloured)
        return float(off.square().mean())

    images = grey(16)
    assert error(with_variety(images)) < 0.95 * error(images)


@pytest.mark.parametrize(("setting", "times"), [(True, 1.25), (False, 1)])
def test_rounding_looks_at_copies_where_it_is_to(
    setting: bool, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def note(_student: object, _teacher: object, images: Tensor, **_: object) -> None:
        counted.append(len(images))

    monkeypatch.setattr(pipeline, "gptq_quantize", note)
    section = load_recipe("w4a8", [f"quantization.other_worlds={setting}"]).quantization
    teacher = fold(tiny_detector())
    student = insert_quantizers(teacher.clone(), section.policy())
    pixels = (blobs(8) * 255).to(torch.uint8)
    pipeline.calibrate_and_round(student, teacher, pixels, section, Silent())
    assert counted == [8 * times]


def test_classifiers_are_rounded_on_their_images_alone() -> None:
    section = load_recipe("w4a8", ["quantization.other_worlds=true"]).quantization
    detector = tiny_detector()
    assert sees_other_worlds(detector, section)
    detector.task = "classification"
    assert not sees_other_worlds(detector, section)

"""Swing convolutions move what strided convolutions see, and nothing is moved without them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tiny_detector import blobs, tiny_detector
from torch import Generator, Tensor, nn

from dfq.models.base import Detector
from dfq.recipe import Recipe
from dfq.runs.identity import identity_of_recipe, in_todays_keys
from dfq.synthesis.augmentation import initial_images
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.pipeline import determinants
from dfq.synthesis.settings import Synthesis, Techniques
from dfq.synthesis.swing import swinging

SIDE = 64


@pytest.fixture(scope="module")
def detector() -> Detector:
    detector = tiny_detector()
    detector.module.requires_grad_(False)
    return detector


def test_swing_moves_the_input_of_strided_convolutions(detector: Detector) -> None:
    images = blobs(1).requires_grad_()
    first = next(m for m in detector.module.modules() if isinstance(m, nn.Conv2d))
    assert first.stride == (2, 2)
    seen: list[Tensor] = []
    padded = F.pad(images.detach(), (1, 1, 1, 1), mode="reflect")
    moved = [
        padded[:, :, y : y + SIDE, x : x + SIDE].contiguous() for y in range(3) for x in range(3)
    ]
    with swinging(detector.module, [Generator().manual_seed(0)]):
        handle = first.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        for _ in range(60):
            first(images)
        with torch.no_grad():
            first(images)
        handle.remove()
    places = [[torch.equal(one, other) for other in moved].index(True) for one in seen[:-1]]
    # Every one of the nine places, and none without gradients.
    assert set(places) == set(range(9))
    assert torch.equal(seen[-1], images)
    before = first(images)
    assert torch.equal(before, first(images))


def test_a_batch_is_another_one_with_it_and_fixed_by_its_seed(detector: Detector) -> None:
    def batch(swing: bool) -> Tensor:
        wanted = Synthesis(
            image_size=SIDE,
            iterations=3,
            multires=0,
            labels="multi",
            precision="float32",
            techniques=Techniques(swing=swing),
        )
        return Inversion(detector, wanted).batch(2, 0, 0).images

    changed = batch(True)
    assert torch.equal(changed, batch(True))
    assert not torch.equal(changed, batch(False))


def test_pink_noise_has_amplitudes_that_fall_with_the_frequency() -> None:
    images = initial_images(100, SIDE, "pink", Generator().manual_seed(0))
    assert images.shape == (100, 3, SIDE, SIDE)
    assert images.min() >= 0
    assert images.max() <= 1
    assert float(images.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(images.std()) == pytest.approx(0.25, abs=0.02)
    # Along a line of the spectrum, amplitudes fall as 1 / f; 300 draws give them within 8 %.
    spectrum = torch.fft.fft(images.mean(dim=2), dim=2).abs().square().mean(dim=(0, 1)).sqrt()
    assert float(spectrum[3] / spectrum[12]) == pytest.approx(4, rel=0.2)
    odd = initial_images(1, 33, "pink", Generator().manual_seed(0))
    assert odd.shape == (1, 3, 33, 33)


def test_sets_are_known_by_what_they_were_recorded_with(detector: Detector) -> None:
    # Settings of a set that was made when there were more of them, where they changed nothing.
    synthesis = determinants(detector, Synthesis(), 0)["synthesis"]
    assert synthesis["label_stage"]["reuse"] is False
    off = ("low_pass", "zoom", "soft_labels", "slack", "emphasis", "per_image")
    assert synthesis["techniques"] == {"swing": False, **dict.fromkeys(off, 0.0)}
    old = {**Recipe().model_dump(mode="json"), "synthesis": synthesis}
    del old["model"], old["evaluation"]
    old["synthesis"]["image_size"] = None
    old["synthesis"]["precision"] = "auto"
    old["synthesis"]["weights"] |= {"entropy": 1.0, "l2": 0.0}
    old["synthesis"]["masks"] = "ellipse"
    known = in_todays_keys({"recipe": old})["recipe"]
    assert known == identity_of_recipe(Recipe())
    old["synthesis"]["techniques"]["zoom"] = 0.3
    assert in_todays_keys({"recipe": old})["recipe"] == old

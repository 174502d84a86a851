"""What each technique changes, and that nothing changes without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_detector import blobs, tiny_detector
from torch import Generator, Tensor, nn

from dfq.models.base import Detector, Targets
from dfq.synthesis.augmentation import initial_images
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.losses.batchnorm import BatchNormStatistics
from dfq.synthesis.losses.image_statistics import ImageStatistics
from dfq.synthesis.settings import LabelStage, Synthesis, SynthesisWeights
from dfq.synthesis.settings import Techniques as Settings
from dfq.synthesis.techniques import Techniques, blurred, smoothed

SIDE = 64


@pytest.fixture(scope="module")
def detector() -> Detector:
    detector = tiny_detector()
    detector.module.requires_grad_(False)
    return detector


def techniques(detector: Detector, **settings: Any) -> Techniques:
    statistics = BatchNormStatistics(detector.module)
    return Techniques(Settings(**settings), detector, statistics, form="relative")


def one_label(count: int) -> Targets:
    return Targets(torch.tensor([[float(i), 1, 0.5, 0.5, 0.5, 0.5] for i in range(count)]))


def test_by_default_nothing_changes(detector: Detector) -> None:
    off = techniques(detector)
    images, targets, generator = blobs(2), one_label(2), Generator().manual_seed(0)
    before = generator.get_state()
    view, labels = off.view(images, targets, generator)
    assert view is images
    assert labels is targets
    assert off.gradient(images) is images
    distances = torch.rand(5)
    assert off.distances(distances) is distances
    expected = detector.raw(images)
    with off.watching(generator):
        found = detector.raw(images)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(generator.get_state(), before)


def test_smoothing_draws_so_many_categories() -> None:
    targets = Targets(torch.cat([torch.zeros(3000, 1), torch.full((3000, 5), 0.5)], dim=1))
    targets.data[:, 1] = 2
    found = smoothed(targets, 4, 0.4, Generator().manual_seed(0)).data
    assert targets.data[:, 1].eq(2).all()
    assert torch.equal(found[:, [0, 2, 3, 4, 5]], targets.data[:, [0, 2, 3, 4, 5]])
    shares = torch.bincount(found[:, 1].long(), minlength=4) / 3000
    # Label smoothing: 0.4 / 4 for each category, and 0.6 more for the label's own.
    assert shares.tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1], abs=0.025)


def test_the_mean_loss_is_that_of_smoothed_labels() -> None:
    logits, share, draws = torch.randn(4, generator=Generator().manual_seed(3)), 0.3, 4000
    targets = Targets(torch.tensor([[0, 1, 0.5, 0.5, 0.1, 0.1]]).repeat(draws, 1))
    drawn = smoothed(targets, 4, share, Generator().manual_seed(0)).data[:, 1].long()
    mean = F.cross_entropy(logits.expand(draws, 4), drawn)
    wanted = F.cross_entropy(logits[None], torch.tensor([1]), label_smoothing=share)
    assert float(mean) == pytest.approx(float(wanted), abs=0.05)


def test_a_blur_is_a_gaussian_in_the_frequency_domain() -> None:
    sigma, size = 1.5, 48
    wave = torch.cos(2 * torch.pi * 3 * (torch.arange(size) + 0.5) / (2 * size))
    images = wave.expand(1, 3, size, size).contiguous()
    # A cosine that the mirror continues is an eigenfunction, but for what the kernel's cut costs.
    factor = torch.exp(torch.tensor(-0.5 * (sigma * torch.pi * 3 / size) ** 2))
    middle = slice(8, -8)
    torch.testing.assert_close(
        blurred(images, sigma)[..., middle], factor * images[..., middle], atol=2e-3, rtol=0
    )
    constant = torch.full((2, 3, 5, 5), 0.3)
    torch.testing.assert_close(blurred(constant, 4.0), constant)
    # Down, too, and each channel alone.
    spike = torch.zeros(1, 3, 9, 9)
    spike[0, 1, 4, 4] = 1
    found = blurred(spike, 1.0)
    assert found[0, [0, 2]].abs().max() == 0
    torch.testing.assert_close(found[0, 1], found[0, 1].T)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


def test_zoom_moves_images_and_labels(detector: Detector) -> None:
    images = torch.zeros(8, 3, SIDE, SIDE)
    images[:, :, 16:48, 16:48] = 1.0
    view, labels = techniques(detector, zoom=0.3).view(
        images, one_label(8), Generator().manual_seed(0)
    )
    sides = labels.data[:, 4] * SIDE
    assert float((sides - 32).abs().max()) > 4
    bright = (view[:, 0] > 0.75).flatten(1).sum(1).sqrt()
    torch.testing.assert_close(bright, sides, atol=2.0, rtol=0)


def test_slack_and_emphasis(detector: Detector) -> None:
    distances = torch.tensor([0.05, 0.3, 0.2, 0.1])
    found = techniques(detector, slack=0.15).distances(distances)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.15, 0.05, 0.0]))
    # Depths 1/4 to 1: their squares, over the mean of those.
    found = techniques(detector, emphasis=2).distances(torch.ones(4))
    torch.testing.assert_close(found, torch.tensor([1.0, 4.0, 9.0, 16.0]) / 7.5)
    found = techniques(detector, emphasis=-1).distances(torch.ones(4))
    torch.testing.assert_close(found, torch.tensor([4.0, 2.0, 4 / 3, 1.0]) / (25 / 12))


@pytest.mark.parametrize("form", ["absolute", "relative", "gaussian"])
def test_statistics_of_one_image_are_those_of_a_batch_of_one(detector: Detector, form: str) -> None:
    images = blobs(3, seed=5)
    statistics = BatchNormStatistics(detector.module)
    with ImageStatistics(statistics, form) as alone:
        detector.raw(images.requires_grad_())
        found = alone.distances()
    each = []
    with statistics:
        for image in images.detach():
            detector.raw(image[None])
            if form == "gaussian":
                each.append(statistics.divergences())
            else:
                each.append(statistics.distances(relative=form == "relative"))
    torch.testing.assert_close(found, torch.stack(each).mean(0), rtol=1e-3, atol=1e-4)


def test_a_share_of_the_distances_is_by_image(detector: Detector) -> None:
    images = blobs(3, seed=5).requires_grad_()

    def distances(share: float) -> Tensor:
        chosen = techniques(detector, per_image=share)
        with statistics, chosen.watching(Generator()):
            detector.raw(images)
            return chosen.distances(statistics.distances(relative=True))

    statistics = BatchNormStatistics(detector.module)
    batch, each = distances(0.0), distances(1.0)
    assert (each > batch).all()
    torch.testing.assert_close(distances(0.25), 0.75 * batch + 0.25 * each)
    torch.testing.assert_close(distances(-0.25), 0.75 * batch - 0.25 * each)


def test_swing_moves_the_input_of_strided_convolutions(detector: Detector) -> None:
    images = blobs(1).requires_grad_()
    first = next(m for m in detector.module.modules() if isinstance(m, nn.Conv2d))
    assert first.stride == (2, 2)
    seen: list[Tensor] = []
    padded = F.pad(images.detach(), (1, 1, 1, 1), mode="reflect")
    moved = [
        padded[:, :, y : y + SIDE, x : x + SIDE].contiguous() for y in range(3) for x in range(3)
    ]
    with techniques(detector, swing=True).watching(Generator().manual_seed(0)):
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


@pytest.mark.parametrize(
    "settings",
    [
        {"low_pass": 1.0},
        {"zoom": 0.3},
        {"swing": True},
        {"soft_labels": 0.5},
        {"slack": 1e3},
        {"emphasis": 1.0},
        {"per_image": 0.5},
        {"per_image": -0.2},
    ],
    ids=str,
)
def test_a_batch_is_another_one_with_each_and_fixed_by_its_seed(
    detector: Detector, settings: dict[str, Any]
) -> None:
    def batch(chosen: Settings) -> Tensor:
        wanted = Synthesis(
            image_size=SIDE,
            iterations=3,
            multires=0,
            labels="multi",
            precision="float32",
            weights=SynthesisWeights(tv=0.1),
            techniques=chosen,
        )
        return Inversion(detector, wanted).batch(2, 0, 0).images

    changed = batch(Settings(**settings))
    assert torch.equal(changed, batch(Settings(**settings)))
    assert not torch.equal(changed, batch(Settings()))


def test_images_go_on_from_those_of_the_label_stage(detector: Detector) -> None:
    def images(reuse: bool) -> Tensor:
        stage = LabelStage(image_size=32, iterations=4, updates=2, reuse=reuse)
        wanted = Synthesis(
            image_size=SIDE, iterations=0, multires=0, precision="float32", label_stage=stage
        )
        inversion = Inversion(detector, wanted)
        return inversion.batch(2, 0, 0).images.float() / 255

    reused, fresh = images(True), images(False)
    # Enlarged twice, neighbours are alike; in noise they are not.
    assert roughness(reused) < 0.5 * roughness(fresh)


def roughness(images: Tensor) -> float:
    return float((images[..., 1:] - images[..., :-1]).abs().mean())

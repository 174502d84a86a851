"""Noise that the first BatchNorm takes for its training data."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, nn

from dfq.graph.fold_batchnorm import fold_batchnorm
from dfq.synthesis.augmentation import initial_images
from dfq.synthesis.losses.batchnorm import BatchNormStatistics
from dfq.synthesis.start import Start, matched_start


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("colour", "contrast"), [((0.1, 0.2, 0.15), 0.1), ((0.7, 0.6, 0.65), 0.3)])
def test_colour_and_contrast_of_the_training_data_are_found(
    colour: tuple[float, ...], contrast: float, folded: bool
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=1.0))
    made = Start("uniform", torch.tensor(colour), contrast)
    network(made.noise(64, 64, Generator().manual_seed(5)))
    network.eval().requires_grad_(False)
    if folded:
        fold_batchnorm(network, lambda: network(torch.rand(1, 3, 64, 64)))
    found = matched_start(BatchNormStatistics(network), network, 64, "uniform")
    torch.testing.assert_close(found.colour, torch.tensor(colour), atol=0.03, rtol=0)
    assert found.contrast == pytest.approx(contrast, rel=0.1)


def test_pace_follows_the_contrast_down() -> None:
    assert Start("uniform").pace == 1
    assert Start("uniform", contrast=0.1).pace == pytest.approx(0.25)


def test_without_statistics_it_is_the_noise_itself() -> None:
    expected = initial_images(2, 32, "pink", Generator().manual_seed(3))
    found = Start("pink").noise(2, 32, Generator().manual_seed(3))
    torch.testing.assert_close(found, expected)

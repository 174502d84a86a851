"""Where images start, and what of them the network is shown."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from dfq.synthesis.views import Augmented, initial_images, random_erasing_mask


def test_erasing_mask() -> None:
    size, count = 160, 600
    mask = random_erasing_mask(count, size, 0.3, Generator().manual_seed(0))
    assert mask.shape == (count, 1, size, size)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    erased = (1 - mask).flatten(1).sum(1)
    drawn = erased > 0
    # 600 draws at 0.3: three standard deviations are 0.056.
    assert float(drawn.float().mean()) == pytest.approx(0.3, abs=0.06)
    areas, aspects = [], []
    for image in mask[drawn, 0]:
        rows, columns = (image == 0).any(1), (image == 0).any(0)
        height, width = int(rows.sum()), int(columns.sum())
        # One solid rectangle: as many blanked pixels as its bounding box has.
        box = image[rows][:, columns]
        assert not box.any()
        assert int((image == 0).sum()) == height * width
        areas.append(height * width / size**2)
        aspects.append(height / width)
    # A pixel's rounding on each side of a rectangle widens the limits a little.
    assert 0.015 < min(areas) < 0.04
    assert 0.17 < max(areas) < 0.215
    assert 1 / 3.6 < min(aspects) < 0.5
    assert 2 < max(aspects) < 3.6


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_erasing_probability_limits(probability: float, share: float) -> None:
    mask = random_erasing_mask(50, 64, probability, Generator().manual_seed(1))
    assert float((mask.flatten(1).min(1).values == 0).float().mean()) == share


@pytest.mark.parametrize(
    ("kind", "deviation"),
    # Uniform on [0, 1]: 1 / sqrt(12). Gaussian of 0.25, of which 5 % are cut: a little below.
    [("uniform", 12**-0.5), ("gaussian", 0.24)],
)
def test_initial_images(kind: str, deviation: float) -> None:
    images = initial_images(3, 64, kind, Generator().manual_seed(0))
    assert images.shape == (3, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    assert float(images.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(images.std()) == pytest.approx(deviation, abs=0.01)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("erase", [False, True])
def test_augmenting_gives_the_gradient_of_the_plain_chain(flip: bool, erase: bool) -> None:
    pixels = torch.rand(4, 3, 6, 6, requires_grad=True)
    flipped = torch.tensor([True, False, True, False]) if flip else None
    kept = (torch.rand(4, 1, 6, 6) > 0.3).float() if erase else None
    plain = pixels
    if flipped is not None:
        plain = torch.where(flipped[:, None, None, None], plain.flip(3), plain)
    if kept is not None:
        plain = plain * kept
    weight = torch.rand_like(pixels)
    (expected,) = torch.autograd.grad((plain * weight).sum(), pixels)
    view = Augmented.apply(pixels, flipped, kept)
    torch.testing.assert_close(view, plain)
    (gradient,) = torch.autograd.grad((view * weight).sum(), pixels)
    torch.testing.assert_close(gradient, expected)

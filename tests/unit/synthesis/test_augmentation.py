"""Where images start, and what of them the network is shown."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from dfq.kernels import loader as compiled
from dfq.synthesis.augmentation import augmented_view, initial_images, random_erasing


@pytest.fixture(params=["compiled", "torch"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(compiled, "_library", lambda: None)


def mask_of(rectangles: Tensor, size: int) -> Tensor:
    """1 to keep, 0 to blank, `(n, 1, size, size)`."""
    mask = torch.ones(len(rectangles), 1, size, size)
    for image, (first, last, begin, end) in zip(mask, rectangles.tolist(), strict=True):
        for row in range(first, last):
            image[0, row, begin:end] = 0
    return mask


def test_erased_rectangles() -> None:
    size, count = 160, 600
    rectangles = random_erasing(count, size, 0.3, Generator().manual_seed(0))
    assert rectangles.shape == (count, 4)
    assert rectangles.dtype == torch.int32
    assert ((rectangles[:, 2:] >= 0) & (rectangles[:, 2:] <= size)).all()
    mask = mask_of(rectangles, size)
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
    mask = mask_of(random_erasing(50, 64, probability, Generator().manual_seed(1)), 64)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_either")
def test_what_is_shown_and_its_gradient(flip: bool, erase: bool, dtype: torch.dtype) -> None:
    # Wider than a vector, and no multiple of one.
    count, size = 4, 37
    generator = Generator().manual_seed(0)
    pixels = torch.rand(count, 3, size, size, generator=generator).requires_grad_()
    flipped = torch.tensor([True, False, True, False]) if flip else None
    # Within the image, at two of its edges, all of it, and none.
    edges = [[3, 20, 5, 30], [0, 9, 30, size], [0, size, 0, size], [7, 6, 2, 9]]
    erased = torch.tensor(edges, dtype=torch.int32) if erase else None
    plain = pixels
    if flipped is not None:
        plain = torch.where(flipped[:, None, None, None], plain.flip(3), plain)
    if erased is not None:
        plain = plain * mask_of(erased, size)
    plain = plain.to(dtype)
    weight = torch.randn(plain.shape, generator=generator).to(dtype)
    (expected,) = torch.autograd.grad(plain, pixels, weight)
    view = augmented_view(pixels, flipped, erased, dtype)
    assert view.dtype == dtype
    assert torch.equal(view, plain)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = weight.contiguous(memory_format=layout)
        (gradient,) = torch.autograd.grad(view, pixels, given, retain_graph=True)
        assert gradient.is_contiguous()
        assert torch.equal(gradient, expected)


@pytest.mark.usefixtures("_either")
def test_images_of_other_channels_and_layouts() -> None:
    for channels, layout in ((1, torch.contiguous_format), (3, torch.channels_last)):
        pixels = torch.rand(2, channels, 5, 6).contiguous(memory_format=layout).requires_grad_()
        flipped = torch.tensor([False, True])
        erased = torch.tensor([[1, 3, 0, 2]] * 2, dtype=torch.int32)
        view = augmented_view(pixels, flipped, erased)
        expected = torch.stack([pixels[0], pixels[1].flip(2)]).detach()
        expected[:, :, 1:3, 0:2] = 0
        assert torch.equal(view, expected)
        (gradient,) = torch.autograd.grad(view.sum(), pixels)
        kept = torch.ones(2, channels, 5, 6)
        kept[0, :, 1:3, 0:2] = 0
        kept[1, :, 1:3, 4:6] = 0
        assert torch.equal(gradient, kept)

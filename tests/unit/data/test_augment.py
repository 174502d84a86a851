"""Flips and zooms move boxes and masks as they move what is in them; cameras move nothing."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from dfq.data import augment as module
from dfq.data.augment import augment, camera, jitter_colours, mosaic
from dfq.models.base import Targets

SIDE = 96
GREY = 114 / 255


def rectangles(count: int, seed: int = 0) -> tuple[Tensor, Targets]:
    """One bright rectangle on grey an image, and its box."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((count, 3, SIDE, SIDE), GREY)
    rows = []
    for index in range(count):
        x, y = torch.randint(0, SIDE - 40, (2,), generator=generator).tolist()
        width, height = torch.randint(12, 40, (2,), generator=generator).tolist()
        images[index, :, y : y + height, x : x + width] = 1.0
        box = [x + width / 2, y + height / 2, width, height]
        rows.append([index, index % 3, *[value / SIDE for value in box]])
    return images, Targets(torch.tensor(rows))


def bright_box(image: Tensor) -> Tensor:
    """x1 y1 x2 y2 in pixels of what is more than half as bright as a rectangle."""
    bright = image[0] > (1 + GREY) / 2
    ys, xs = bright.any(dim=1).nonzero().flatten(), bright.any(dim=0).nonzero().flatten()
    return torch.tensor([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]).float()


def box_of(row: Tensor) -> Tensor:
    centre, half = row[2:4] * SIDE, row[4:6] * SIDE / 2
    return torch.cat([centre - half, centre + half])


@pytest.mark.parametrize(("flip", "zoom"), [(1.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.3)])
def test_boxes_still_bound_their_rectangles(flip: float, zoom: float) -> None:
    images, targets = rectangles(60)
    generator = torch.Generator().manual_seed(1)
    moved, labels = augment(images, targets, generator, flip=flip, zoom=zoom)
    assert moved.shape == images.shape
    assert len(labels) >= 50
    changed = 0
    for row in labels.data:
        index = int(row[0])
        assert (bright_box(moved[index]) - box_of(row)).abs().max() <= 1.5
        assert row[1] == index % 3
        changed += int((row - targets.data[index]).abs().max() > 1 / SIDE)
    assert changed > 15


def test_what_is_flipped_is_mirrored_exactly() -> None:
    images, targets = torch.rand(40, 3, 8, 10), Targets.empty()
    moved, labels = augment(images, targets, torch.Generator().manual_seed(0), flip=0.5, zoom=0.0)
    mirrored = [torch.equal(moved[i], images[i].flip(2)) for i in range(40)]
    kept = [torch.equal(moved[i], images[i]) for i in range(40)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 10 < sum(mirrored) < 30
    assert len(labels) == 0


def test_zoom_scales_within_its_share_and_both_ways() -> None:
    images, _ = rectangles(200)
    box = torch.tensor([[float(index), 0, 0.5, 0.5, 0.01, 0.01] for index in range(200)])
    generator = torch.Generator().manual_seed(2)
    _, labels = augment(images, Targets(box), generator, flip=0.0, zoom=0.4)
    factors = labels.data[:, 4] / 0.01
    # Boxes in the middle never leave the image: about the corner, 1.4 x 0.5 = 0.7 is the farthest.
    assert len(labels) == 200
    assert 0.6 <= factors.min() < 0.65
    assert 1.35 < factors.max() <= 1.4 + 1e-5


def test_shrunk_images_stay_whole_on_grey() -> None:
    images = torch.ones(64, 3, SIDE, SIDE)
    whole = Targets(torch.tensor([[float(i), 0, 0.5, 0.5, 1, 1] for i in range(64)]))
    moved, labels = augment(images, whole, torch.Generator().manual_seed(3), flip=0.0, zoom=0.5)
    for row in labels.data:
        x1, y1, x2, y2 = box_of(row).tolist()
        image = moved[int(row[0])]
        if x2 - x1 < SIDE - 2:
            # All of it is there, not a part cut off by the frame.
            assert float((image - GREY).sum() / (1 - GREY) / 3) == pytest.approx(
                (x2 - x1) * (y2 - y1), rel=0.02
            )
        else:
            torch.testing.assert_close(image[:, 2:-2, 2:-2], torch.ones(3, SIDE - 4, SIDE - 4))
    assert (labels.data[:, 4] < 0.9).sum() > 10


def test_boxes_stay_in_the_image_and_lost_ones_are_dropped() -> None:
    count = 200
    generator = torch.Generator().manual_seed(4)
    size = 0.05 + 0.2 * torch.rand(count, 2, generator=generator)
    centre = size / 2 + (1 - size) * torch.rand(count, 2, generator=generator)
    index = torch.arange(count).float()[:, None]
    targets = Targets(torch.cat([index, torch.zeros(count, 1), centre, size], dim=1))
    images = torch.rand(count, 3, 16, 16)
    _, labels = augment(images, targets, generator, flip=0.5, zoom=0.9)
    low = labels.data[:, 2:4] - labels.data[:, 4:6] / 2
    high = labels.data[:, 2:4] + labels.data[:, 4:6] / 2
    assert low.min() >= -1e-6
    assert high.max() <= 1 + 1e-6
    assert (labels.data[:, 4:6] > 0).all()
    assert 100 < len(labels) < count
    assert torch.equal(labels.data[:, 0].unique(), labels.data[:, 0])


def test_the_generator_alone_decides() -> None:
    images, targets = rectangles(8)
    outcomes: list[tuple[Tensor, Targets]] = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed * 100 + len(outcomes))
        generator = torch.Generator().manual_seed(seed)
        outcomes.append(augment(images, targets, generator, flip=0.5, zoom=0.3))
    (a, la), (b, lb), (c, _) = outcomes
    assert torch.equal(a, b)
    assert torch.equal(la.data, lb.data)
    assert not torch.equal(a, c)


def test_nothing_asked_nothing_done() -> None:
    images, targets = rectangles(4)
    moved, labels = augment(images, targets, torch.Generator(), flip=0.0, zoom=0.0)
    assert torch.equal(moved, images)
    assert torch.equal(labels.data, targets.data)


def test_inputs_are_left_as_they_were() -> None:
    images, targets = rectangles(4)
    kept, boxes = images.clone(), targets.data.clone()
    augment(images, targets, torch.Generator().manual_seed(0), flip=1.0, zoom=0.5)
    assert torch.equal(images, kept)
    assert torch.equal(targets.data, boxes)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def zoomed(
    image: Tensor, factor: float, x: float, y: float, outside: float, smooth: bool
) -> Tensor:
    """One image scaled about a point in pixels, pixel by pixel."""
    channels, height, width = image.shape
    result = torch.empty_like(image)

    def at(row: int, column: int) -> Tensor:
        if 0 <= row < height and 0 <= column < width:
            return image[:, row, column]
        return torch.full((channels,), outside)

    for row in range(height):
        for column in range(width):
            # The middle of a pixel is half a pixel from its edges.
            down, right = (row + 0.5 - y) / factor + y - 0.5, (column + 0.5 - x) / factor + x - 0.5
            if not smooth:
                result[:, row, column] = at(round(down), round(right))
                continue
            top, left = math.floor(down), math.floor(right)
            a, b = down - top, right - left
            upper = (1 - b) * at(top, left) + b * at(top, left + 1)
            lower = (1 - b) * at(top + 1, left) + b * at(top + 1, left + 1)
            result[:, row, column] = (1 - a) * upper + a * lower
    return result


def test_flips_and_zooms_are_what_one_image_at_a_time_gives() -> None:
    """Of images that are not square, with none, one, and several objects."""
    height, width, count = 9, 14, 12
    images = torch.rand(count, 3, height, width, generator=seeded(1))
    owner = torch.tensor([0.0, 1, 1, 3, 4, 4, 4, 6, 7, 8, 8, 9, 10, 10, 11, 11])
    size = 0.1 + 0.3 * torch.rand(len(owner), 2, generator=seeded(2))
    centre = size / 2 + (1 - size) * torch.rand(len(owner), 2, generator=seeded(3))
    kind = torch.arange(len(owner)).float()
    targets = Targets(torch.cat([owner[:, None], kind[:, None], centre, size], dim=1))
    masks = torch.rand(len(owner), height, width, generator=seeded(4)) < 0.5
    moved, labels, seen = augment(images, targets, seeded(5), flip=0.5, zoom=0.9, masks=masks)
    flip, scale, across, down = torch.rand(4, count, generator=seeded(5)).tolist()
    kept = {int(row[1]): (row, mask) for row, mask in zip(labels.data, seen, strict=True)}
    assert seen.dtype == torch.bool
    dropped = 0
    for index in range(count):
        mirror = flip[index] < 0.5
        factor = 1 + 0.9 * (2 * scale[index] - 1)
        x, y = across[index] * width, down[index] * height
        image = images[index].flip(2) if mirror else images[index]
        expected = zoomed(image, factor, x, y, GREY, smooth=True)
        torch.testing.assert_close(moved[index], expected, atol=2e-5, rtol=0)
        for number in (owner == index).nonzero().flatten().tolist():
            cx, cy, w, h = targets.data[number, 2:].tolist()
            cx = 1 - cx if mirror else cx
            # Edges in pixels, before and after clipping.
            edges = [(cx - w / 2) * width, (cy - h / 2) * height]
            edges += [(cx + w / 2) * width, (cy + h / 2) * height]
            edges = [factor * (e - c) + c for e, c in zip(edges, (x, y, x, y), strict=True)]
            limits = (width, height) * 2
            inside = [min(max(e, 0), limit) for e, limit in zip(edges, limits, strict=True)]
            left = [(inside[i + 2] - inside[i]) / (edges[i + 2] - edges[i]) for i in (0, 1)]
            assert (number in kept) == (min(left) > 0.25)
            dropped += number not in kept
            if number not in kept:
                continue
            row, mask = kept[number]
            given = [row[2] - row[4] / 2, row[3] - row[5] / 2]
            given += [row[2] + row[4] / 2, row[3] + row[5] / 2]
            for value, limit, edge in zip(given, limits, inside, strict=True):
                assert float(value) * limit == pytest.approx(edge, abs=1e-4)
            pixels = masks[number].flip(1) if mirror else masks[number]
            wanted = zoomed(pixels[None].float(), factor, x, y, 0.0, smooth=False)[0]
            assert torch.equal(mask.float(), wanted)
    assert dropped
    assert {flip[index] < 0.5 for index in range(count)} == {True, False}


def test_masks_follow_their_rectangles() -> None:
    images, targets = rectangles(40)
    masks = (images[:, 0] > 0.9).to(torch.uint8)
    moved, labels, seen = augment(images, targets, seeded(7), flip=0.5, zoom=0.4, masks=masks)
    assert seen.dtype == torch.uint8
    assert len(seen) == len(labels)
    for row, mask in zip(labels.data, seen, strict=True):
        bright = moved[int(row[0]), 0] > (1 + GREY) / 2
        # Nearest and bilinear part at the rim only.
        assert int((bright != mask.bool()).sum()) <= 4 * 60
        assert (bright_box(mask[None].float()) - box_of(row)).abs().max() <= 1.5


def test_masks_that_belong_to_no_label_are_refused() -> None:
    images, targets = rectangles(3)
    for shape in ((2, SIDE, SIDE), (3, SIDE, SIDE + 1)):
        with pytest.raises(ValueError, match="one for each label"):
            augment(images, targets, seeded(), flip=0.5, zoom=0.0, masks=torch.zeros(shape))


Change = Callable[[Tensor, Targets, Generator], object]
CHANGES: dict[str, Change] = {
    "augment": lambda x, t, g: augment(x, t, g, flip=0.5, zoom=0.3),
    "mosaic": mosaic,
    "colours": lambda x, t, g: jitter_colours(x, 0.2, g),
    "camera": lambda x, t, g: camera(x, 0.7, g),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_global_generator_neither_counts_nor_moves(name: str) -> None:
    images, targets = rectangles(4)
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        given = CHANGES[name](images, targets, seeded(3))
        assert torch.equal(torch.get_rng_state(), before)
        outcomes.append(given[0] if isinstance(given, tuple) else given)
    assert isinstance(outcomes[0], Tensor)
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], images)


PARTS = ("BLUR", "EXPOSURE", "DAYLIGHT_STEPS", "NOISE", "JPEG_WORST")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Switches all of a camera off but one part."""

    def only(part: str) -> None:
        for name in set(PARTS) - {part}:
            monkeypatch.setattr(module, name, 100.0 if name == "JPEG_WORST" else 0)
        if part != "JPEG_WORST":
            monkeypatch.setattr(module, "JPEG_BEST", 100.0)

    return only


def smooth(count: int, side: int = 64) -> Tensor:
    """Coloured blobs in the middle of the range: nothing is clipped."""
    small = 0.3 + 0.3 * torch.rand(count, 3, 8, 8, generator=seeded(9))
    return torch.nn.functional.interpolate(small, size=(side, side), mode="bicubic")


def test_a_camera_without_any_part_changes_next_to_nothing(alone: Callable[[str], None]) -> None:
    alone("")
    images = smooth(4)
    # JPEG keeps colours at half the size.
    assert (camera(images, 1.0, seeded()) - images).abs().mean() < 0.005


def test_exposure_is_of_up_to_a_stop_either_way(alone: Callable[[str], None]) -> None:
    alone("EXPOSURE")
    images = smooth(60)
    gain = camera(images, 1.0, seeded()).mean((2, 3)) / images.mean((2, 3))
    assert (gain.amax(1) - gain.amin(1)).max() < 0.02
    # A stop is twice the light, and pixels hold about the power 1 / 2.2 of it.
    stops = 2.2 * gain.mean(1).log2()
    assert -1.05 < stops.min() < -0.8
    assert 0.8 < stops.max() < 1.05
    half = camera(images, 0.5, seeded()).mean((2, 3)) / images.mean((2, 3))
    torch.testing.assert_close(2.2 * half.mean(1).log2(), stops / 2, atol=0.05, rtol=0)


def test_white_balance_trades_red_for_blue(alone: Callable[[str], None]) -> None:
    alone("DAYLIGHT_STEPS")
    images = smooth(60)
    gain = camera(images, 1.0, seeded()).mean((2, 3)) / images.mean((2, 3))
    red, green, blue = gain.T
    torch.testing.assert_close(green, torch.ones(60), atol=0.02, rtol=0)
    assert ((red - 1) * (blue - 1) < 1e-3).all()
    assert red.max() > 1.15
    assert blue.max() > 1.15


def test_blur_is_gaussian(alone: Callable[[str], None]) -> None:
    alone("BLUR")
    images = smooth(12) + 0.1 * torch.randn(12, 3, 64, 64, generator=seeded(8)).clamp(-2, 2)
    blurred = camera(images, 0.8, seeded(4))
    widths = 0.8 * 1.5 * torch.rand(5, 12, generator=seeded(4))[0]
    assert widths.min() < 0.3 < 0.9 < widths.max()
    for image, given, width in zip(images, blurred, widths.tolist(), strict=True):
        pixels = image.permute(1, 2, 0).numpy()
        wanted = cv2.GaussianBlur(
            pixels, (9, 9), max(width, 0.1), borderType=cv2.BORDER_REFLECT_101
        )
        # What is left is JPEG of quality 100, which keeps colours at half the size.
        grey = np.float32([0.299, 0.587, 0.114])
        assert np.abs((given.permute(1, 2, 0).numpy() - wanted) @ grey).mean() < 0.004


def test_noise_differs_from_image_to_image(alone: Callable[[str], None]) -> None:
    alone("NOISE")
    images = torch.full((30, 3, 64, 64), 0.5)
    grey = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    spread = ((camera(images, 1.0, seeded()) - images) * grey).sum(1).std((1, 2))
    # Of the sum of three channels' noise, so weighted.
    most = 0.05 * float(grey.square().sum().sqrt())
    assert spread.min() < 0.2 * most
    assert 0.8 * most < spread.max() < 1.05 * most


def test_jpeg_is_that_of_files(alone: Callable[[str], None]) -> None:
    alone("JPEG_WORST")
    images = (smooth(8) + 0.15 * torch.randn(8, 3, 64, 64, generator=seeded(6))).clamp(0, 1)
    stored = camera(images, 1.0, seeded(2))
    qualities = 95 - 60 * torch.rand(5, 8, generator=seeded(2))[2]
    for image, given, quality in zip(images, stored, qualities.tolist(), strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=round(quality), subsampling="4:2:0")
        wanted = np.asarray(Image.open(file), dtype=np.float32) / 255
        off = np.abs(given.permute(1, 2, 0).numpy() - wanted).mean()
        assert off < 0.5 * np.abs(pixels / 255 - wanted).mean()


def test_cameras_stay_in_range_and_of_their_strength() -> None:
    images, _ = rectangles(6)
    kept = images.clone()
    assert camera(images, 0.0, seeded()) is images
    weak, strong = (camera(images, strength, seeded()) for strength in (0.1, 1.0))
    for given in (weak, strong):
        assert given.shape == images.shape
        assert given.min() >= 0
        assert given.max() <= 1
    assert (weak - images).abs().mean() < 0.5 * (strong - images).abs().mean()
    assert torch.equal(images, kept)
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="strength of a camera"):
            camera(images, strength, seeded())

"""Flips and zooms move boxes as they move what is in them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dfq.data.augment import augment
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

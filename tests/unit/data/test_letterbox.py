from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfq.data.image_set import make_item
from dfq.data.letterbox import letterbox, load_letterboxed
from dfq.data.readers import ImageSet


def picture(width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """Black, with a white rectangle."""
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


@pytest.mark.parametrize(
    ("width", "height", "rect", "canvas", "content"),
    [
        # canvas (w, h) and content (left, top, right, bottom), by hand.
        (200, 100, False, (64, 64), (0, 16, 64, 48)),
        (100, 200, False, (64, 64), (16, 0, 48, 64)),
        (200, 100, True, (64, 32), (0, 0, 64, 32)),
        (32, 16, False, (64, 64), (0, 16, 64, 48)),
        (128, 96, True, (64, 64), (0, 8, 64, 56)),
        (64, 64, True, (64, 64), (0, 0, 64, 64)),
    ],
)
def test_geometry(width, height, rect, canvas, content):
    image, transform = letterbox(picture(width, height, (0, 0, width, height)), 64, 32, rect=rect)
    assert image.shape == (canvas[1], canvas[0], 3)
    assert image.dtype == np.uint8
    expected = np.full((canvas[1], canvas[0], 3), 114, np.uint8)
    left, top, right, bottom = content
    expected[top:bottom, left:right] = 255
    np.testing.assert_array_equal(image, expected)
    whole = transform.apply(torch.tensor([[0.0, 0.0, width, height]]))
    assert whole.tolist() == [[left, top, right, bottom]]


@pytest.mark.parametrize(("width", "height"), [(210, 130), (37, 90), (64, 48)])
def test_boxes_follow_the_pixels(width, height):
    box = (width // 4, height // 3, width // 2, height - 7)
    image, transform = letterbox(picture(width, height, box), 96, 32, rect=False)
    x1, y1, x2, y2 = transform.apply(torch.tensor([box], dtype=torch.float32))[0].tolist()
    rows, columns = np.nonzero(image[:, :, 0] > 160)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(found, [x1, y1, x2, y2], atol=1.0)


def test_undo_reverses_apply_and_clips():
    _, transform = letterbox(picture(210, 130, (0, 0, 1, 1)), 96, 32, rect=True)
    boxes = torch.tensor([[3.0, 5.0, 200.0, 129.0], [0.0, 0.0, 210.0, 130.0]])
    torch.testing.assert_close(transform.undo(transform.apply(boxes)), boxes)
    outside = torch.tensor([[-50.0, -50.0, 500.0, 500.0]])
    assert transform.undo(outside).tolist() == [[0, 0, 210, 130]]
    assert transform.undo(torch.zeros(0, 4)).shape == (0, 4)


@pytest.fixture
def two_images(tmp_path: Path) -> ImageSet:
    items = []
    for index, (width, height) in enumerate([(100, 50), (40, 80)]):
        path = tmp_path / f"{index}.png"
        Image.fromarray(picture(width, height, (0, 0, width, height))).save(path)
        boxes = [[0, 0, width, height], [0, 0, width / 2, height / 2], [1, 1, 9, 9]]
        item, _ = make_item(path, (width, height), index, boxes, [0, 1, 0], [False, False, True])
        items.append(item)
    return ImageSet(tmp_path, ["cat", "dog"], items)


def test_batch(two_images):
    images, targets, transforms = load_letterboxed(two_images, [1, 0], 64, 32)
    assert images.shape == (2, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.max() == 1
    assert images[0, 0, 0, 0] == pytest.approx(114 / 255)
    assert [transform.original for transform in transforms] == [(40, 80), (100, 50)]
    # 40 x 80 fills columns 16 to 48 of 64; the ignored third box is no target.
    expected = [
        [0, 0, 0.5, 0.5, 0.5, 1],
        [0, 1, 0.375, 0.25, 0.25, 0.5],
        [1, 0, 0.5, 0.5, 1, 0.5],
        [1, 1, 0.25, 0.375, 0.5, 0.25],
    ]
    torch.testing.assert_close(targets.data, torch.tensor(expected))


def test_batch_with_the_models_categories(two_images):
    _, targets, _ = load_letterboxed(two_images, [0], 64, 32, mapping=[None, 7])
    assert targets.data[:, :2].tolist() == [[0, 7]]
    _, targets, _ = load_letterboxed(two_images, [0], 64, 32, mapping=[None, None])
    assert targets.data.shape == (0, 6)


def test_rectangular_batch_holds_every_image(two_images):
    images, targets, _ = load_letterboxed(two_images, [0], 64, 32, rect=True)
    assert images.shape == (1, 3, 32, 64)
    assert targets.data[0].tolist() == [0, 0, 0.5, 0.5, 1, 1]
    images, _, _ = load_letterboxed(two_images, [0, 1], 64, 32, rect=True)
    assert images.shape == (2, 3, 64, 64)

"""Images with boxes: where the boxes are, what tags say, and what is left out."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dfq.data.drawing import COLOURS
from dfq.report.pictures import MOST_BOXES, Tile, tile


def drawn(boxes: list[list[float]], scores: list[float], names: list[str], side: int = 64) -> Tile:
    pixels = np.full((side, side * 2, 3), 200, np.uint8)
    corners = np.array(boxes, float).reshape(-1, 4)
    labels = list(range(len(boxes)))
    return tile(pixels, corners, labels, scores, names, with_scores=True)


def test_boxes_lie_where_they_were_found() -> None:
    found = drawn([[0.25, 0.5, 0.75, 1.0]], [0.5], ["cat"])
    assert found.width == 2 * found.height
    (box,) = found.boxes
    assert (box.x, box.width) == (0.25 * found.width, 0.5 * found.width)
    assert (box.y, box.height) == (0.5 * found.height, 0.5 * found.height)
    assert box.tag == "cat 0.50"
    assert box.colour == COLOURS[0]
    image = Image.open(io.BytesIO(base64.b64decode(found.data.partition(",")[2])))
    assert image.format == "JPEG"
    assert image.size == (320, 160)


def test_a_tall_image_stands_in_the_middle() -> None:
    pixels = np.full((640, 64, 3), 200, np.uint8)
    corners = np.array([[0.0, 0.0, 1.0, 1.0]])
    found = tile(pixels, corners, [0], [0.5], ["cat"], with_scores=True)
    (box,) = found.boxes
    assert (found.width, found.height) == (240, 360)
    assert box.width == pytest.approx(36)
    assert box.x + box.width / 2 == pytest.approx(120)
    assert (found.left, found.across) == (box.x, box.width)


def test_nothing_found() -> None:
    found = drawn([], [], [])
    assert (found.boxes, found.words, found.more) == ([], "nothing", 0)


@pytest.mark.parametrize("name", ["x" * 1000, "ж" * 40, "猫" * 40, "a\nb\x00", "‮gnp"])
def test_tags_stay_within_the_image(name: str) -> None:
    for box in ([0.9, 0.9, 1.0, 1.0], [0.0, 0.0, 0.01, 0.01], [-5.0, -5.0, 9.0, 9.0]):
        (found,) = drawn([box], [0.9], [name]).boxes
        assert found.tag_x >= 0
        assert found.tag_x + found.tag_width <= 240
        assert 0 <= found.x <= 240
        assert found.tag.isprintable()
        assert len(found.tag) < 60


def test_the_surest_of_many_are_drawn() -> None:
    count = MOST_BOXES + 5
    scores = [0.31 + 0.01 * i for i in range(count)]
    names = [f"n{i}" for i in range(count)]
    found = drawn([[0.1, 0.1, 0.5, 0.5]] * count, scores, names)
    assert found.more == 5
    assert {box.tag.split()[0] for box in found.boxes} == set(names[5:])
    assert found.words.startswith(names[-1])


def test_boxes_of_a_network_that_has_diverged_are_left_out() -> None:
    nan, inf = float("nan"), float("inf")
    found = drawn([[nan, 0, 1, 1], [0, 0, inf, 1], [0, 0, 1, 1]], [0.9, 0.9, nan], ["a", "b", "c"])
    assert (found.boxes, found.more) == ([], 0)

"""The demo's picture: each network's detections on its own side, tags that can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfq.data import drawing
from dfq.data.calibration_set import CalibrationSet
from dfq.data.readers import ImageSet, open_set
from dfq.demo import picture
from dfq.demo.picture import Column, draw_picture
from dfq.models.base import Detections

GREY = (90, 90, 90)


@pytest.fixture
def scenes(tmp_path: Path) -> ImageSet:
    for index in range(2):
        Image.new("RGB", (160, 160), GREY).save(tmp_path / f"{index}.png")
    found = open_set(tmp_path)
    return ImageSet(found.source, ["ball", "ring"], found.items)


@pytest.fixture
def made(tmp_path: Path) -> CalibrationSet:
    """Two images, of which the second has a label to be drawn."""
    (tmp_path / "made").mkdir()
    for index, colour in enumerate(("blue", "yellow")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "made" / f"{index}.png")
    label = torch.tensor([[1, 0.5, 0.5, 0.5, 0.5]])
    return CalibrationSet(
        tmp_path / "made", ["ball", "ring"], ["0.png", "1.png"], [label, label],
        [torch.tensor([0.1]), torch.tensor([0.9])], {},
    )  # fmt: skip


def seen(*rows: tuple[list[float], float, int]) -> Detections:
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(
        torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels).long()
    )


def coloured(image: Image.Image, box: tuple[int, int, int, int], colour: str) -> int:
    """How many pixels of a part have just this colour."""
    part = np.asarray(image.crop(box))
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((part == wanted).all(axis=2).sum())


def test_each_side_shows_its_own_network(scenes: ImageSet, made: CalibrationSet) -> None:
    box = [40.0, 40, 120, 120]
    left = Column("float", "AP 0.9", [seen((box, 0.9, 0)), seen()])
    right = Column("4-bit", "AP 0.8", [seen((box, 0.3, 0)), seen((box, 0.8, 1))])
    image = draw_picture(scenes, [0, 1], (left, right), made)
    tile, gap, edge = picture._TILE, picture._GAP, picture._MARGIN
    starts = [edge, edge + tile + gap]
    starts += [start + 2 * tile + gap + picture._BETWEEN for start in starts]
    ball, ring = drawing.COLOURS[:2]
    drawn = [
        [coloured(image, (x, 128, x + tile, 128 + tile), colour) > 200 for colour in (ball, ring)]
        for x in starts
    ]
    # The first scene's ball, which the 4-bit network is not sure of; the second's ring.
    assert drawn == [[True, False], [False, False], [False, False], [False, True]]
    # Whatever is there to be read is in the headings.
    for x in starts:
        assert coloured(image, (x, 70, x + tile, 100), drawing.INK) > 20
    # Below, what has labels comes first.
    height = image.size[1]
    strip = [
        image.getpixel((edge + 4, height - edge - 4)),
        image.getpixel((edge + 240 + gap + 8, height - edge - 4)),
    ]
    assert strip == [(255, 255, 0), (0, 0, 255)]


def test_tags_cover_no_other_and_stay_inside() -> None:
    boxes = np.array([[100, 100, 200, 200]] * 4 + [[0, 0, 30, 30], [250, 0, 299, 299]], float)
    taken: list[drawing.Place] = []
    for box in boxes:
        taken.append(drawing.place_tag(box, (60, 18), (300, 300), taken))
    for place in taken:
        assert 0 <= place[0] < place[2] < 300
        assert 0 <= place[1] < place[3] < 300
    assert not any(drawing.meet(a, b) for i, a in enumerate(taken) for b in taken[:i])

"""Instance masks, from a detector's boxes and grids to COCO's figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pycocotools import mask as coco_mask
from support.coco_parts import NAMES, FakeDetector, found, image_set
from support.masks_parts import BOX, Segmenting, outlined
from torch import Tensor

from dfq.cli.main import cli
from dfq.evaluation.coco import evaluate, predict, score
from dfq.evaluation.masks import encode, paste
from dfq.models.base import Detections


def polygon(x1: float, y1: float, x2: float, y2: float) -> list[list[float]]:
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def test_a_full_mask_fills_its_box() -> None:
    filled = paste(torch.ones(28, 28), torch.tensor(BOX), 200, 100)
    assert filled.shape == (100, 200)
    assert filled[10:50, 20:60].all()
    assert filled.sum() == 40 * 40
    # A quarter of the box is in the image; values are too low at its corner.
    quarter = paste(torch.ones(7, 7), torch.tensor([-20.0, -10.0, 20.0, 10.0]), 30, 30)
    assert quarter[:10, :20].sum() == quarter.sum() == 199
    for nothing in ([5.0, 5, 5, 9], [300.0, 5, 310, 9], [float("nan"), 0, 5, 5]):
        assert paste(torch.ones(7, 7), torch.tensor(nothing), 30, 30).sum() == 0


def test_half_a_mask_fills_half_its_box() -> None:
    mask = torch.zeros(4, 4)
    mask[:, :2] = 1
    filled = paste(mask, torch.tensor(BOX), 200, 100)
    # Cells are ten pixels wide: the corners on the left are rounded off.
    assert filled[15:45, 20:40].all()
    assert not filled[:, 40:].any()


@pytest.mark.parametrize("seed", range(3))
def test_pasting_is_mmdets(seed: int) -> None:
    from dfq.models.mmdet.config import require_mmdet

    require_mmdet()
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(16, 2, 2, generator=generator) * torch.tensor([140.0, 90.0]) - 20
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1)
    masks = torch.rand(16, 14, 14, generator=generator)
    for mask, box in zip(masks, boxes, strict=True):
        theirs, _ = _do_paste_mask(mask[None, None], box[None], 80, 120, skip_empty=False)
        ours = paste(mask, box, 120, 80)
        # A pixel whose value is within rounding of one half may go either way.
        assert (ours != (theirs[0] >= 0.5).numpy()).sum() <= 1


def test_run_lengths_hold_the_pixels() -> None:
    mask = torch.rand(1, 14, 14, generator=torch.Generator().manual_seed(0))
    (segment,) = encode(mask, torch.tensor([BOX]), 200, 100)
    assert isinstance(segment, dict)
    assert segment["size"] == [100, 200]
    assert np.array_equal(coco_mask.decode(segment), paste(mask[0], torch.tensor(BOX), 200, 100))


def test_masks_and_not_boxes_decide() -> None:
    # The object is the left half of its box. A full mask overlaps it by 1/2: right at 0.50 only.
    data = outlined((BOX, polygon(20, 10, 40, 50)))
    answer = [found((BOX, 0.9, 0))]
    half = torch.zeros(1, 28, 28)
    half[:, :, :14] = 1
    for masks, expected in ((half, 1.0), (torch.ones(1, 28, 28), 0.1), (half.flip(2), 0.0)):
        segments = [encode(masks, answer[0].boxes, 200, 100)]
        assert pytest.approx(expected) == score(data, answer, NAMES, segments).AP
    assert pytest.approx(1) == score(data, answer, NAMES).AP
    # 800 square pixels are small, though the box is not.
    right = score(data, answer, NAMES, [encode(half, answer[0].boxes, 200, 100)])
    assert pytest.approx(1) == right.AP50
    # A detection beyond those with masks counts as none.
    assert score(data, answer, NAMES, [[]]).AP == 0


def on_canvas(boxes: Tensor) -> Tensor:
    """At 64 px a 200 x 100 image is shrunk to 0.32 of its size, 16 px below the top edge."""
    return boxes * 0.32 + torch.tensor([0.0, 16.0, 0.0, 16.0])


def test_through_a_detector(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "0.png")
    # The detector's box of the second reaches out of the image: clipping it would move its mask.
    objects = (BOX, polygon(20, 10, 40, 50)), ([160, 60, 190, 100], polygon(160, 60, 190, 100))
    data = outlined(*objects)
    data = replace(data, items=[replace(data.items[0], path=tmp_path / "0.png")])
    second = torch.tensor([160.0, 60.0, 220.0, 100.0])
    boxes = on_canvas(torch.stack([torch.tensor(BOX), second]))
    answer = Detections(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 0]))
    metrics = evaluate(Segmenting([answer]), data)
    assert metrics.masks is not None
    assert pytest.approx(1) == metrics.masks.AP
    assert metrics.masks.images == 1
    assert metrics.AP < 1
    plain = metrics.to_dict()
    assert plain["masks"]["AP"] == pytest.approx(1)
    assert plain["masks"]["masks"] is None
    assert predict(Segmenting([answer]), data)[0].masks is None
    # Without masks in the detector, or in the set, there is nothing to measure.
    assert evaluate(FakeDetector([answer]), data).masks is None
    bare = replace(data, items=[replace(data.items[0], segments=())])
    assert evaluate(Segmenting([answer]), bare).masks is None


def test_images_with_unknown_outlines_are_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "0.png")
    known = outlined((BOX, polygon(20, 10, 40, 50))).items[0]
    partly = outlined((BOX, polygon(20, 10, 40, 50)), ([100.0, 0, 150, 50], None)).items[0]
    empty = image_set([]).items[0]
    items = [
        replace(item, image_id=index, path=tmp_path / "0.png")
        for index, item in enumerate((partly, known, empty), 1)
    ]
    data = replace(outlined(), items=items)
    answers = [
        Detections(on_canvas(torch.tensor([BOX])), torch.tensor([0.9]), torch.tensor([0])),
        Detections(on_canvas(torch.tensor([BOX])), torch.tensor([0.8]), torch.tensor([0])),
        found(),
    ]
    metrics = evaluate(Segmenting(answers), data)
    assert metrics.images == 3
    assert metrics.masks is not None
    assert metrics.masks.images == 2
    assert pytest.approx(1) == metrics.masks.AP
    assert metrics.masks.AP_interval is None
    between = evaluate(Segmenting(answers), data, interval=True)
    assert between.AP_interval is not None
    assert between.masks is not None
    # A draw without the one image that has an object has no AP, and counts for nothing.
    assert between.masks.AP_interval == (pytest.approx(1),) * 2
    assert between.to_dict()["masks"]["AP_interval"] == [pytest.approx(1)] * 2


def test_the_command_prints_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = outlined((BOX, polygon(20, 10, 40, 50)))
    answer = [found((BOX, 0.9, 0))]
    half = torch.zeros(1, 28, 28)
    half[:, :, :14] = 1
    masks = score(data, answer, NAMES, [encode(half, answer[0].boxes, 200, 100)])
    result = replace(score(data, answer, NAMES), image_size=64, images=2, masks=masks)
    monkeypatch.setattr("dfq.api.evaluate.evaluate", lambda *_, **__: result)
    shown = CliRunner().invoke(cli, ["eval", "--model", "m", "--data", "d"]).output
    assert "boxes   masks\n" in shown
    assert "AP         1.0000  1.0000\n" in shown
    assert "masks on 1 of them" in shown

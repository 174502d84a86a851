"""Outlines as COCO writes them: those that pycocotools would misread, or crash on, are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from dfq.data.outlines import BrokenOutline, outline
from dfq.data.readers import open_set
from dfq.errors import UserError

WIDTH, HEIGHT = 40, 20


def runs(*counts: Any, size: Any = (HEIGHT, WIDTH)) -> dict[str, Any]:
    return {"size": list(size), "counts": list(counts)}


def text(counts: str, size: Any = (HEIGHT, WIDTH)) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}


@pytest.mark.parametrize("seed", range(20))
def test_what_pycocotools_writes_is_read(seed: int) -> None:
    draw = np.random.default_rng(seed)
    mask = draw.random((HEIGHT, WIDTH)) < draw.choice([0, 0.01, 0.3, 0.5, 0.9, 1])
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    given = text(encoded["counts"].decode())
    assert outline(given, WIDTH, HEIGHT) == given
    # The same without compression: runs of zeros and ones in turn, column by column.
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(int)))
    counts = np.diff([0, *edges.tolist(), flat.size]).tolist()
    plain = runs(*counts)
    assert outline(plain, WIDTH, HEIGHT) == plain
    assert np.array_equal(
        coco_mask.decode(coco_mask.frPyObjects(plain, HEIGHT, WIDTH)), mask.astype(np.uint8)
    )


def test_wide_runs_are_read() -> None:
    mask = np.zeros((3000, 4000), np.uint8)
    mask[1000:2000, 1500:3900] = 1
    encoded = coco_mask.encode(np.asfortranarray(mask))
    given = text(encoded["counts"].decode(), (3000, 4000))
    assert outline(given, 4000, 3000) == given


def test_polygons_are_read() -> None:
    square = [1.0, 2, 11, 2, 11, 7, 1, 7]
    assert outline([square], WIDTH, HEIGHT) == [square]
    # Two points enclose nothing; an annotation may reach over the edge a little.
    assert outline([[1, 2, 3, 4]], WIDTH, HEIGHT) is None
    assert outline([], WIDTH, HEIGHT) is None
    assert outline(None, WIDTH, HEIGHT) is None
    assert outline([[-1, -1, 41, -1, 41, 21]], WIDTH, HEIGHT) == [[-1, -1, 41, -1, 41, 21]]


WHOLE = coco_mask.encode(np.ones((HEIGHT, WIDTH), np.uint8, order="F"))["counts"].decode()

BROKEN: dict[str, tuple[Any, str]] = {
    "negative": (runs(-5, 805), "negative"),
    "negative of the right sum": (runs(900, -100), "negative"),
    "text": (runs("5", 795), "no numbers"),
    "null": (runs(None, 800), "no numbers"),
    "true": (runs(True, 799), "no numbers"),
    "lists": (runs([5], 795), "no numbers"),
    "huge": (runs(10**30, 800), "too large"),
    "endless": (runs(10**400), "too large"),
    "nan": (runs(float("nan"), 800), "negative, too large"),
    "infinite": (runs(float("inf")), "too large"),
    "halves": (runs(400.5, 399.5), "no whole numbers"),
    "too few": (runs(100, 100), "of 200 pixels, but the image has 800"),
    "too many": (runs(800, 1), "of 801 pixels, but the image has 800"),
    "none": (runs(), "of 0 pixels"),
    "another size": (runs(5, 795, size=(WIDTH, HEIGHT)), "but the image is 20 high and 40 wide"),
    "a size of one": (runs(800, size=(800,)), "but the image is 20 high"),
    "a size of text": (runs(800, size=("20", "40")), "but the image is 20 high"),
    "a negative size": (runs(800, size=(-20, -40)), "but the image is 20 high"),
    "a huge size": (runs(800, size=(10**9, 10**9)), "but the image is 20 high"),
    "no size": ({"counts": [800]}, "but the image is 20 high"),
    "no counts": ({"size": [HEIGHT, WIDTH]}, "is neither a list of polygons"),
    "counts of a number": ({"size": [HEIGHT, WIDTH], "counts": 800}, "is neither a list"),
    "other characters": (text("!!"), "characters that cannot be in them"),
    "characters beyond": (text("~~~"), "characters that cannot be in them"),
    "letters of another script": (text("äöü"), "characters that cannot be in them"),
    "cut short": (text("o"), "cut short"),
    "empty": (text(""), "of 0 pixels"),
    "a run without end": (text("o" * 100 + "0"), "longer than any image"),
    "negative in letters": (text("O"), "negative"),
    "of another mask": (text(WHOLE + "5"), "pixels, but the image has"),
    "a number": (7, "is neither"),
    "a word": ("outline", "is neither"),
    "odd corners": ([[1, 2, 3]], "is neither"),
    "corners of text": ([["1", "2", "3", "4", "5", "6"]], "is neither"),
    "corners without a list": ([1, 2, 3, 4, 5, 6], "is neither"),
    "nan corners": ([[float("nan"), 1, 2, 3, 4, 5]], "far out of the image"),
    "infinite corners": ([[float("inf"), 1, 2, 3, 4, 5]], "far out of the image"),
    "corners a mile away": ([[1e9, 1, 2, 3, 4, 5]], "far out of the image"),
    "endless corners": ([[10**400, 1, 2, 3, 4, 5]], "far out of the image"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_outlines(case: str, tmp_path: Path) -> None:
    given, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        outline(given, WIDTH, HEIGHT)
    # In a set they are no mistake until masks are asked for; then one line names the object.
    (tmp_path / "images").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "a.png")
    row = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 5], "segmentation": given}
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [row],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    found = open_set(tmp_path)
    assert found.items[0].boxes.tolist() == [[1, 2, 11, 7]]
    assert isinstance(found.items[0].segments[0], BrokenOutline)
    with pytest.raises(UserError, match=r"annotations\[0\] \(id 7\): its 'segmentation' ") as error:
        found.segmented()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_masks_are_refused_before_the_work(tmp_path: Path) -> None:
    from support.coco_parts import found
    from support.masks_parts import BOX, Segmenting, outlined

    from dfq.evaluation.coco import evaluate

    Image.new("RGB", (200, 100)).save(tmp_path / "0.png")
    data = outlined((BOX, [[20, 10, 40, 10, 40, 50]]))
    broken = BrokenOutline("set.json: annotations[0]: its 'segmentation' is broken")
    item = replace(data.items[0], path=tmp_path / "0.png", segments=(broken,))
    data = replace(data, items=[item])

    class Untouched(Segmenting):
        def detect(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("detected before the outlines were checked")

    with pytest.raises(UserError, match="'segmentation' is broken"):
        evaluate(Untouched([found()]), data)
    # A detector of boxes measures them.
    from support.coco_parts import FakeDetector

    on_canvas = torch.tensor(BOX) * 0.32 + torch.tensor([0.0, 16, 0, 16])
    detections = [found((on_canvas.tolist(), 0.9, 0))]
    assert pytest.approx(1) == evaluate(FakeDetector(detections), data).AP

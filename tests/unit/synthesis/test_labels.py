"""Starts, and teacher scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.label_rows import NOTHING, SIZE, A, B, found, label
from torch import Generator, Tensor
from torchvision.ops import box_iou

from dfq.data.image_set import ImageSet, make_item
from dfq.errors import UserError
from dfq.synthesis.labels import (
    STARTS,
    DrawnLike,
    RealLabels,
    label_source_identity,
    label_start,
    scattered,
    teacher_scores,
    to_corners,
)
from dfq.synthesis.settings import LABELS, LabelStage, Synthesis

CLASSES = 7


@pytest.mark.parametrize("kind", sorted(STARTS))
def test_starts_lie_in_the_image(kind: str) -> None:
    labels = STARTS[kind](Generator().manual_seed(3), 200, CLASSES)
    assert len(labels) == 200
    every = torch.cat(labels)
    assert every.shape[1] == 5
    assert every.dtype == torch.float32
    if kind == "none":
        assert not len(every)
        return
    category, centre, sides = every[:, 0], every[:, 1:3], every[:, 3:]
    assert set(category.int().tolist()) == set(range(CLASSES))
    assert torch.equal(category, category.round())
    assert (centre - sides / 2).min() >= -1e-6
    assert (centre + sides / 2).max() <= 1 + 1e-6
    counts = {len(rows) for rows in labels}
    many = set(range(1, 26))
    assert counts == {"adaptive": {1}, "single": {1}, "multi": many, "tile": {4, 9}}[kind]
    if kind != "tile":
        assert sides.min() >= 0.2
        assert sides.max() <= 0.8
        # Uniform on [0.2, 0.8]: the mean of some hundred draws is near 0.5.
        assert float(sides.mean()) == pytest.approx(0.5, abs=0.04)


def test_tiles_do_not_overlap() -> None:
    from torchvision.ops import box_convert, box_iou

    for rows in STARTS["tile"](Generator().manual_seed(0), 20, CLASSES):
        overlap = box_iou(*[box_convert(rows[:, 1:], "cxcywh", "xyxy")] * 2)
        assert torch.equal(overlap > 0, torch.eye(len(rows), dtype=torch.bool))


def test_a_tile_is_a_random_box_in_its_cell() -> None:
    shares, places = [], []
    for rows in STARTS["tile"](Generator().manual_seed(0), 300, CLASSES):
        side = round(len(rows) ** 0.5)
        corners = (to_corners(rows[:, 1:]) * side).reshape(side, side, 4)
        cells = torch.cartesian_prod(*[torch.arange(side)] * 2).reshape(side, side, 2)
        start, end = corners[..., :2] - cells, corners[..., 2:] - cells
        assert start.min() >= -1e-5
        assert end.max() <= 1 + 1e-5
        shares.append((end - start).reshape(-1, 2))
        places.append((start / (1 - (end - start))).reshape(-1, 2))
    # Of a cell, as single labels have it of an image; uniform between the smallest and the largest.
    for drawn, low, high in ((torch.cat(shares), 0.2, 0.8), (torch.cat(places), 0.0, 1.0)):
        assert float(drawn.min()) == pytest.approx(low, abs=0.01)
        assert float(drawn.max()) == pytest.approx(high, abs=0.01)
        assert float(drawn.mean()) == pytest.approx((low + high) / 2, abs=0.02)
        assert float(drawn.std()) == pytest.approx((high - low) / 12**0.5, abs=0.02)


# Categories and sizes in half and quarter images, some too large for a cell: once, twice, once.
LIKE = [[(0, 0.5, 0.5, 0.25, 0.125)], [(1, 0.5, 0.5, 0.5, 1.0)] * 2 + [(2, 0.5, 0.5, 0.25, 0.25)]]


@pytest.mark.parametrize("tiled", [False, True])
def test_objects_in_distribution_are_as_frequent_and_as_large(tiled: bool) -> None:
    start = DrawnLike([torch.tensor(rows) for rows in LIKE], tiled=tiled)
    labels = start(Generator().manual_seed(0), 400, CLASSES)
    counts = [len(label) for label in labels]
    assert set(counts) == ({4, 9} if tiled else {1, 3})
    # Both images as often; three deviations of 400 draws are 0.075.
    assert np.mean([n < 4 if not tiled else n == 4 for n in counts]) == pytest.approx(
        0.5 if tiled else 1, abs=0.075
    )
    if not tiled:
        assert counts.count(1) / 400 == pytest.approx(0.5, abs=0.075)
    every = torch.cat(labels)
    corners = to_corners(every[:, 1:])
    assert corners.min() >= -1e-6
    assert corners.max() <= 1 + 1e-6
    for category, share, sides in ((0, 0.25, (0.25, 0.125)), (2, 0.25, (0.25, 0.25))):
        own = every[:, 0] == category
        assert float(own.float().mean()) == pytest.approx(share, abs=0.05)
        torch.testing.assert_close(every[own][:, 3:], torch.tensor([sides]).expand(own.sum(), 2))
        assert float(every[own][:, 1].std()) > 0.1
    large = every[every[:, 0] == 1][:, 3:]
    # The shape stays; where there are cells, the long side is the cell's.
    torch.testing.assert_close(large[:, 0] * 2, large[:, 1])
    long = {round(float(side), 4) for side in large[:, 1]}
    assert long == ({0.5, 0.3333} if tiled else {1.0})


def test_starts_depend_on_the_generator_alone() -> None:
    for start in STARTS.values():
        first, again = (start(Generator().manual_seed(5), 9, 3) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_teacher_scores() -> None:
    labels = [label(A, B, (2, 0, 60, 30, 90)), label(), label(A)]
    detections = [
        found(
            (2, 10, 10, 40, 40),  # A's place, another category
            (2, 60, 60, 90, 89),  # B
            (1, 10, 10, 40, 41),  # A
            (1, 11, 10, 40, 40),  # A again, less sure
            (2, 0, 80, 30, 110),  # the third by an IoU of 0.2
        ),
        found(A),
        NOTHING,
    ]
    first, second, third = teacher_scores(labels, detections, SIZE)
    torch.testing.assert_close(first, torch.tensor([0.7, 0.8, 0.0]))
    assert second.shape == (0,)
    torch.testing.assert_close(third, torch.zeros(1))


def real(*images: list[tuple[float, ...]], size: tuple[int, int] = (80, 40)) -> ImageSet:
    """Images of (category, x1, y1, x2, y2) each, in pixels; categories "x", "dog", "cat"."""
    items = [
        make_item(Path(f"{i}.png"), size, i, [r[1:] for r in rows], [int(r[0]) for r in rows])[0]
        for i, rows in enumerate(images)
    ]
    return ImageSet(Path("real"), ["x", "dog", "cat"], items)


def draw(start: RealLabels, count: int, seed: int = 0) -> list[Tensor]:
    return start(Generator().manual_seed(seed), count, 2)


def test_real_labels_are_letterboxed_and_matched_by_name() -> None:
    # 80 x 40 on a square of 80: a border of 20 above and below. "x" is unknown to the detector.
    rows = [(2, 0, 0, 40, 20), (0, 10, 10, 20, 20), (1, 40, 10, 90, 50)]
    (found,) = draw(RealLabels(real(rows), ["cat", "dog"]), 1)
    assert found.dtype == torch.float32
    expected = [
        [0, 20 / 80, 30 / 80, 40 / 80, 20 / 80],
        # Cut at the image: 40 to 80, 10 to 40.
        [1, 60 / 80, 45 / 80, 40 / 80, 30 / 80],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_real_labels_agree_with_the_letterbox_of_the_images(kit: Path) -> None:
    from dfq.data.letterbox import load_letterboxed
    from dfq.data.readers import open_set
    from dfq.models.coco_categories import COCO_NAMES

    images = open_set(kit / "coco-val").head(6)
    mapping = images.category_mapping(COCO_NAMES)
    _, targets, _ = load_letterboxed(images, range(6), 640, 32, mapping=mapping)
    expected = [label for label in targets.per_image(6) if len(label)]
    # Sides are rounded to whole pixels there.
    for ours, theirs in zip(RealLabels(images, COCO_NAMES).labels, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1.5 / 640, rtol=0)


def test_real_labels_leave_out_what_is_no_object() -> None:
    crowd, _ = make_item(
        Path("a.png"), (10, 10), 1, [(0, 0, 5, 5), (2, 2, 9, 9)], [1, 1], [True, False]
    )
    images = ImageSet(
        Path("real"), ["x", "dog", "cat"], [crowd, *real([], [(0, 1, 1, 5, 5)]).items]
    )
    start = RealLabels(images, ["dog"])
    assert [len(label) for label in start.labels] == [1]
    torch.testing.assert_close(start.labels[0][0, 3:], torch.tensor([0.7, 0.7]))


def test_real_labels_are_drawn_without_replacement_while_they_last() -> None:
    start = RealLabels(real(*[[(1, 0, 0, 4 * i, 4 * i)] for i in range(1, 6)]), ["dog"])
    sides = [round(float(label[0, 3]) * 20) for label in draw(start, 13)]
    assert sorted(sides[:5]) == sorted(sides[5:10]) == [1, 2, 3, 4, 5]
    assert len(set(sides[10:])) == 3
    again = [round(float(label[0, 3]) * 20) for label in draw(start, 13)]
    other = [round(float(label[0, 3]) * 20) for label in draw(start, 13, seed=1)]
    assert again == sides != other


def test_drawn_labels_are_copies() -> None:
    start = RealLabels(real([(1, 0, 0, 8, 8)]), ["dog"])
    first, second = draw(start, 2)
    first.zero_()
    assert float(second.sum()) > 0
    assert float(start.labels[0].sum()) > 0


def test_real_labels_without_a_use() -> None:
    with pytest.raises(UserError, match="no category name is shared"):
        RealLabels(real([(1, 0, 0, 8, 8)]), ["bird"])
    with pytest.raises(UserError, match="no object of the model's categories"):
        RealLabels(real([(1, 0, 0, 8, 8)]), ["cat"])


def stored(folder: Path, box: tuple[int, ...] = (8, 8, 30, 24), shade: int = 0) -> str:
    """A COCO set of one image, as a value of `synthesis.labels`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((48, 64, 3), shade, np.uint8)).save(folder / "images" / "0.png")
    document = {
        "images": [{"id": 0, "file_name": "0.png", "width": 64, "height": 48}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "iscrowd": 0, "bbox": box, "area": 1}
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return f"real:{folder}"


def test_label_start(tmp_path: Path) -> None:
    for kind in set(LABELS) - {"adaptive"}:
        assert label_start(Synthesis(labels=kind), ["dog"]) is STARTS[kind]
    assert set(STARTS) == set(LABELS)
    start = label_start(Synthesis(labels=stored(tmp_path / "set")), ["cat", "dog"])
    (found,) = start(Generator(), 1, 2)
    expected = [[1, 23 / 64, 28 / 64, 30 / 64, 24 / 64]]
    torch.testing.assert_close(found, torch.tensor(expected))
    for kind in ("multi", "tile"):
        drawn = label_start(Synthesis(labels=f"{kind}:{tmp_path / 'set'}"), ["cat", "dog"])
        (found,) = drawn(Generator().manual_seed(0), 1, 2)
        assert set(found[:, 0].tolist()) == {1}
        assert len(found) == 1 if kind == "multi" else len(found) in (4, 9)
        with pytest.raises(
            UserError, match=r"synthesis\.labels: .*nothing: no such file or folder"
        ):
            label_start(Synthesis(labels=f"{kind}:{tmp_path / 'nothing'}"), ["dog"])
    with pytest.raises(UserError, match=r"synthesis\.labels: .*nothing: no such file or folder"):
        label_start(Synthesis(labels=f"real:{tmp_path / 'nothing'}"), ["dog"])


def test_the_identity_is_that_of_the_labels(tmp_path: Path) -> None:
    def identity(labels: str) -> str | None:
        return label_source_identity(Synthesis(labels=labels))

    assert all(identity(kind) is None for kind in LABELS)
    first = identity(stored(tmp_path / "a"))
    assert first is not None
    assert len(first) == 64
    # Neither where the set lies nor what its images show matters; the boxes do.
    assert identity(stored(tmp_path / "b", shade=200)) == first
    assert identity(stored(tmp_path / "a").replace("real:", "tile:")) == first
    assert identity(stored(tmp_path / "a", box=(8, 8, 30, 25))) != first


@pytest.mark.parametrize("labels", ["", "real", "real:", "multi:", "Single", "none:set", "dir/set"])
def test_labels_that_are_none(labels: str) -> None:
    with pytest.raises(ValueError, match=r"should be 'adaptive', .*'none' or 'real:SET'"):
        Synthesis(labels=labels)


def test_scattered_labels_are_few_or_many_and_small_or_large() -> None:
    labels = scattered(Generator().manual_seed(0), 1000, 7, most=12, smallest_area=0.0025)
    counts = torch.tensor([len(label) for label in labels])
    assert counts.min() == 1
    assert counts.max() == 12
    # floor(13^u) is 1 with a probability of ln 2 / ln 13 = 0.27, and 12 - ln 12! / ln 13 = 4.21 in
    # the mean, less what found no room.
    assert float((counts == 1).float().mean()) == pytest.approx(0.27, abs=0.05)
    assert 3.5 < float(counts.float().mean()) < 4.21
    every = torch.cat(labels)
    assert set(every[:, 0].tolist()) == set(range(7))
    corners = to_corners(every[:, 1:])
    assert corners.min() >= -1e-6
    assert corners.max() <= 1 + 1e-6
    area = every[:, 3] * every[:, 4]
    assert float(area.min()) == pytest.approx(0.0025, rel=0.05)
    # The small third of COCO, below a hundredth of the image: ln 2 of ln 18 and some that large
    # ones had to make room for.
    assert 0.2 < float((area < 0.01).float().mean()) < 0.4
    ratio = every[:, 3] / every[:, 4]
    assert 0.249 < float(ratio.min()) < 0.3
    assert 3.3 < float(ratio.max()) < 4.01


def test_scattered_labels_hardly_overlap() -> None:
    for rows in scattered(Generator().manual_seed(1), 50, 3, most=32, smallest_area=0.0016):
        overlap = box_iou(*[to_corners(rows[:, 1:])] * 2)
        assert (overlap - torch.eye(len(rows))).max() <= 0.1 + 1e-6


def test_adaptive_labels_begin_as_the_label_stage_says() -> None:
    def counts(stage: LabelStage) -> set[int]:
        start = label_start(Synthesis(label_stage=stage), ["dog"])
        return {len(label) for label in start(Generator().manual_seed(0), 50, 1)}

    assert counts(LabelStage(sampler="paper")) == {1}
    assert 4 < max(counts(LabelStage(objects=9))) <= 9

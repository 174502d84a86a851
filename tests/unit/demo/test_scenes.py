"""The demo scenes are what their docstrings promise, and the shipped detector knows them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from safetensors import safe_open

from dfq.demo import NAMES, demo_weights, draw_scene, write_coco
from dfq.demo.scenes import (
    MAX_OBJECTS,
    SCALE_RANGE,
    TRAINING_SEED_START,
    VALIDATION_SEED_START,
    Scene,
)
from dfq.demo.shapes import SHAPES, coverage
from scripts import train_demo_detector
from scripts.demo_detector import evaluate, rebuild

SIZE = 160


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed, SIZE) for seed in range(500, 800)]


def test_a_scene_is_a_function_of_its_seed() -> None:
    first, other, again = draw_scene(7, SIZE), draw_scene(8, SIZE), draw_scene(7, SIZE)
    for field in ("image", "boxes", "labels", "masks"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("size", [32, 64, 160, 320])
def test_types_and_shapes_at_every_size(size: int) -> None:
    scene = draw_scene(3, size)
    n = len(scene.labels)
    assert scene.image.shape == (size, size, 3)
    assert scene.boxes.shape == (n, 4)
    assert scene.masks.shape == (n, size, size)
    kinds = [array.dtype for array in (scene.image, scene.boxes, scene.labels, scene.masks)]
    assert kinds == [np.uint8, np.float32, np.int64, np.bool_]


def test_a_size_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="32"):
        draw_scene(0, 31)


def test_boxes_are_tight_around_visible_masks(scenes: list[Scene]) -> None:
    for scene in scenes:
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == tight


def test_no_pixel_belongs_to_two_objects(scenes: list[Scene]) -> None:
    assert max(int(scene.masks.sum(axis=0).max()) for scene in scenes) == 1


def test_scales_fill_the_promised_range_and_do_not_leave_it(scenes: list[Scene]) -> None:
    sides = np.concatenate([scene.boxes[:, 2:] - scene.boxes[:, :2] for scene in scenes])
    share = sides.max(axis=1) / SIZE
    low, high = SCALE_RANGE
    assert (low, high) == (0.08, 0.80)
    assert low <= share.min() < 0.1
    assert 0.7 < share.max() <= high
    # Log-uniform up to what occlusion and crowding take away: the median is far below the
    # arithmetic middle (0.44) and not far from the geometric one (0.25).
    assert 0.17 < np.median(share) < 0.3


def test_every_category_appears_about_equally_often(scenes: list[Scene]) -> None:
    counts = np.bincount(np.concatenate([scene.labels for scene in scenes]), minlength=len(NAMES))
    assert len(NAMES) >= 8
    assert len(counts) == len(NAMES)
    assert counts.min() > 0.5 * counts.mean()


def test_images_hold_one_to_seven_objects(scenes: list[Scene]) -> None:
    counts = {len(scene.labels) for scene in scenes}
    assert counts == set(range(1, MAX_OBJECTS + 1))


@pytest.mark.parametrize("name", NAMES)
def test_outlines_stay_within_the_unit_circle_and_paint_within_bounds(name: str) -> None:
    for seed in range(20):
        shape = SHAPES[name](np.random.default_rng(seed))
        reach = max(float(np.hypot(*contour.T).max()) for contour in shape.contours)
        assert 0.9 < reach < 1.0 + 1e-6
        axis = np.linspace(-1.0, 1.0, 33, dtype=np.float32)
        u, v = np.meshgrid(axis, axis)
        painted = shape.paint(u, v)
        assert painted.shape == (33, 33, 3)
        inside = coverage([contour * 16.5 + 16.5 for contour in shape.contours], 33, 33) > 0.99
        assert painted[inside].min() >= -0.05
        assert painted[inside].max() <= 1.25


def test_coverage_measures_area() -> None:
    angle = np.linspace(0.0, 2.0 * np.pi, 200, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    share = coverage([circle * 20.0 + 25.3, circle * 10.0 + 25.3], 51, 51)
    # Every subpixel an edge touches counts as covered: up to a fifth of a pixel along the rim.
    rim = 2.0 * math.pi * (20.0 + 10.0)
    excess = share.sum() - math.pi * (20.0**2 - 10.0**2)
    assert abs(excess) < 0.2 * rim
    assert ((share > 0.0) & (share < 1.0)).any()


def test_write_coco_agrees_with_the_scenes(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "set", 6, 96, first_seed=VALIDATION_SEED_START + 40)
    coco = COCO(path)
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(NAMES)
    assert coco.getCatIds() == list(range(1, len(NAMES) + 1))
    for index, image_id in enumerate(sorted(coco.imgs)):
        scene = draw_scene(VALIDATION_SEED_START + 40 + index, 96)
        entry = coco.imgs[image_id]
        picture = np.asarray(Image.open(path.parent / "images" / entry["file_name"]))
        np.testing.assert_array_equal(picture, scene.image)
        annotations = coco.imgToAnns[image_id]
        assert len(annotations) == len(scene.labels)
        for row, box, label, mask in zip(
            annotations, scene.boxes, scene.labels, scene.masks, strict=True
        ):
            x, y, w, h = row["bbox"]
            assert [x, y, x + w, y + h] == box.tolist()
            assert row["category_id"] == label + 1
            assert row["area"] == mask.sum()
            assert row["iscrowd"] == 0
            np.testing.assert_array_equal(coco.annToMask(row).astype(bool), mask)


def test_training_never_reaches_a_validation_seed() -> None:
    monitor = VALIDATION_SEED_START - train_demo_detector.MONITOR_SCENES
    default = {option.name: option.default for option in train_demo_detector.main.params}["scenes"]
    assert TRAINING_SEED_START + default <= monitor
    with pytest.raises(click.BadParameter, match="training range"):
        train_demo_detector.Pool(monitor - TRAINING_SEED_START + 1, workers=1)


def test_the_weights_are_small_and_describe_themselves() -> None:
    path = demo_weights()
    assert path.stat().st_size <= 4_000_000
    with safe_open(path, "pt") as file:
        spec = json.loads(file.metadata()["dfq"])
        names = set(file.keys())
        kernel = file.get_tensor("model.0.conv.weight")
    assert (spec["family"], spec["task"]) == ("ultralytics", "detect")
    assert (spec["names"], spec["image_size"], spec["stride"]) == (list(NAMES), 160, 32)
    assert spec["yaml"]["nc"] == len(NAMES)
    assert len(spec["fingerprint"]) == 64
    assert str(kernel.dtype) == "torch.float16"
    # Unfused: every BatchNorm keeps its statistics.
    assert {"model.0.bn.running_mean", "model.0.bn.running_var"} <= names


def test_the_shipped_detector_finds_objects_it_never_saw() -> None:
    ap, ap50 = evaluate(rebuild(demo_weights()), VALIDATION_SEED_START, 60)
    assert ap > 0.55
    assert ap50 > 0.7


def test_a_set_whose_writing_is_cut_short_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A demo that goes on would take half a file of annotations for the whole set."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_coco(tmp_path / "scenes", 2, 64)
    assert not (tmp_path / "scenes" / "annotations.json").exists()

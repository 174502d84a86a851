"""Precision and recall are pycocotools', bit by bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from support.coco_parts import NAMES, found, image_set

from dfq.data.outlines import Segment
from dfq.data.readers import ImageSet, open_set
from dfq.evaluation.coco import predict
from dfq.evaluation.coco_accumulation import accumulate
from dfq.evaluation.coco_matching import match
from dfq.models import load_detector
from dfq.models.base import Detections

WIDTH, HEIGHT = 200, 100
Segments = list[list[Segment]] | None


def outline(rng: np.random.Generator, box: list[float]) -> Segment:
    """Polygons, compressed or uncompressed run lengths, about as large as the box."""
    x1, y1, x2, y2 = box
    kind = int(rng.integers(3))
    if kind == 0:
        middle = (x1 + x2) / 2 + 0.3
        return [[x1, y1, middle, y1, middle, y2, x1, y2], [middle, y1, x2, y1, x2, (y1 + y2) / 2]]
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[int(y1) : int(y2), int(x1) : int(x2)] = rng.random() < 0.9
    pixels[int(y1) : int(y1 + y2) // 2, int(x1) : int(x1 + x2) // 2] = 0
    if kind == 1:
        return coco_mask.encode(np.asfortranarray(pixels))
    flat = pixels.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": runs}


def case(seed: int, masks: bool) -> tuple[ImageSet, list[Detections], Segments]:
    """Few or many objects on a coarse grid: IoUs that meet thresholds, equal scores, crowds, areas
    at the ends of ranges, categories without objects, without detections, and unknown to the
    network, images with nothing, and with more detections than count."""
    rng = np.random.default_rng(seed)
    grid = 4 if seed % 2 else 1
    truths: list[Any] = []
    areas, outlines, answers, shapes = [], [], [], []
    for _ in range(int(rng.integers(1, 12))):
        truth, rows = [], []
        for _ in range(int(rng.integers(0, 6))):
            corner = (rng.integers(0, [160, 70]) // grid * grid).astype(float)
            size = rng.choice([4.0, 8.0, 16.0, 32.0, 96.0], 2).clip(max=[160, 70])
            box = [*corner, *np.minimum(corner + size, [WIDTH, HEIGHT])]
            box = [float(value) for value in box]
            label = int(rng.choice([0, 1, 3], p=[0.6, 0.2, 0.2]))
            truth.append((box, label, bool(rng.random() < 0.2)))
            copies = 130 if seed % 10 == 0 and rng.random() < 0.2 else int(rng.integers(0, 4))
            for _ in range(copies):
                moved = np.array(box) + np.tile(rng.integers(-2, 3, 2), 2) * grid / 2
                confidence = float(rng.choice([0.1, 0.5, 0.9]) if seed % 3 else rng.random())
                right = label < 3 and rng.random() < 0.7
                rows.append((moved.clip(0).tolist(), confidence, label if right else 2))
        if seed % 4 == 0 and not masks:
            # What networks that are no good give: nothing wide, inside out, beyond all measure.
            odd = ([5, 5, 5, 9], [9, 9, 5, 5], [-1e30, 0, 1e30, 9], [0, 0, 3e38, 3e38])
            rows += [([float(value) for value in box], 0.7, 0) for box in odd]
        truths.append(truth)
        areas.append(rng.choice([1024.0, 9216.0, 40.0, 2000.0], len(truth)).astype(np.float32))
        outlines.append(tuple(outline(rng, box) for box, _, _ in truth))
        answers.append(found(*rows))
        # Of the first detections only, as networks give them.
        first = answers[-1].boxes.numpy()[: rng.integers(0, len(rows) + 1)]
        shapes.append([coco_mask.encode(_pixels(box)) for box in first])
    data = image_set(*truths, names=[*NAMES, "unknown"])
    # Ids in no order, some of which float64 cannot tell apart.
    ids = (rng.permutation(len(truths)) + (2**53 if seed % 2 else 0)).tolist()
    items = [
        replace(item, area=area, segments=segments, image_id=image_id)
        for item, area, segments, image_id in zip(data.items, areas, outlines, ids, strict=True)
    ]
    return replace(data, items=items), answers, shapes if masks else None


def _pixels(box: np.ndarray) -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    x1, y1, x2, y2 = (int(value) for value in box)
    pixels[y1:y2, x1:x2] = 1
    return pixels


def reference(
    data: ImageSet, answers: list[Detections], shapes: Segments
) -> tuple[np.ndarray, np.ndarray]:
    evaluator, _ = match(data, answers, NAMES, segments=shapes)
    evaluator.accumulate()
    return evaluator.eval["precision"][..., -1], evaluator.eval["recall"][..., -1]


@pytest.mark.parametrize("masks", [False, True])
def test_figures_are_pycocotools_bit_by_bit(masks: bool) -> None:
    """Among them the precision of one right detection out of one, which is not quite 1 there."""
    single = whole = between = 0
    for seed in range(60):
        data, answers, shapes = case(seed, masks)
        if not any(len(item.boxes) for item in data.items):
            continue
        given = accumulate(data, answers, NAMES, shapes)
        precision, recall = reference(data, answers, shapes)
        assert np.array_equal(given.precision, precision), seed
        assert np.array_equal(given.recall, recall), seed
        single += int((precision == 1 / (1 + np.spacing(1))).sum())
        whole += int((precision == 1).sum())
        between += int(((precision > 0) & (precision < 0.99)).sum())
    assert min(single, whole, between) > 500


def test_figures_of_many_objects_are_pycocotools_bit_by_bit() -> None:
    """More objects than recalls: the second one found is between two of them."""
    seen = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        truths, answers = [], []
        for _ in range(15):
            corners = np.stack(np.meshgrid(np.arange(0, 200, 20), [0, 20]), -1).reshape(-1, 2)
            boxes = [[float(x), float(y), x + 16.0, y + 16.0] for x, y in corners]
            truths.append([(box, 0, False) for box in boxes])
            rows = [(box, float(rng.random()), 0) for box in boxes if rng.random() < 0.5]
            rows += [([0.0, 60.0, 9.0, 70.0], float(rng.random()), 0) for _ in range(2)]
            answers.append(found(*rows))
        data = image_set(*truths)
        # The best two: both right, one of them, none.
        best = [(0.999, seed % 2), (0.998, seed // 2 % 2)]
        first = [
            ([0.0, 0.0, 16.0, 16.0] if right else [0.0, 60.0, 9.0, 70.0], confidence, 0)
            for confidence, right in best
        ]
        answers[0] = found(*first)
        given = accumulate(data, answers, NAMES)
        precision, recall = reference(data, answers, None)
        assert np.array_equal(given.precision, precision)
        assert np.array_equal(given.recall, recall)
        seen.add(float(precision[0, 0, 0, 0]))
    assert {1.0, 1 / (1 + np.spacing(1))} < seen


def test_figures_of_photographs_are_pycocotools_bit_by_bit(kit: Any, yolov5n: Any) -> None:
    detector, data = load_detector(yolov5n), open_set(kit / "coco-val").head(12)
    answers = predict(detector, data, image_size=320)
    given = accumulate(data, answers, detector.names)
    evaluator, categories = match(data, answers, detector.names)
    evaluator.accumulate()
    assert given.categories == categories
    assert np.array_equal(given.precision, evaluator.eval["precision"][..., -1])
    assert np.array_equal(given.recall, evaluator.eval["recall"][..., -1])

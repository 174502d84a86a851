"""Procedurally drawn detection scenes: the data the demo detector was trained and is measured on.

Every scene is a function of its seed, so no data set is shipped: training drew from the seeds
`[TRAINING_SEED_START, VALIDATION_SEED_START)`, evaluation draws from `VALIDATION_SEED_START` on.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from ..runtime.files import write_atomic
from .shapes import SHAPES, Array, Generator, Shape, colour, coverage

NAMES: tuple[str, ...] = tuple(SHAPES)
"""Category names, by index."""

TRAINING_SEED_START = 0
"""Seeds from here up to `VALIDATION_SEED_START` are for training."""

VALIDATION_SEED_START = 1_000_000
"""Seeds from here on are for evaluation; nothing was ever trained on them."""

SCALE_RANGE = (0.08, 0.80)
"""Longer side of a visible object, as a share of the image's side."""

MIN_VISIBLE = 0.4
"""The least share of an object's area left uncovered by the objects in front of it."""

MAX_OBJECTS = 7

_STREAM = 20_240_611
"""Keeps the scenes' random stream apart from that of any other user of the same seed."""

_ATTEMPTS = 8


@dataclass(frozen=True)
class Scene:
    """One drawn image and its labels; objects are ordered back to front.

    Attributes:
        image: uint8 `(size, size, 3)`, RGB.
        boxes: float32 `(n, 4)`, x1 y1 x2 y2 in pixels (x2, y2 exclusive), tight around `masks`.
        labels: int64 `(n,)`, indices into `NAMES`.
        masks: bool `(n, size, size)`, the visible pixels of each object; no pixel is in two.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]


def draw_scene(seed: int, size: int) -> Scene:
    """Draw the scene of `seed` at `size` by `size` pixels; equal arguments give equal scenes.

    One to `MAX_OBJECTS` objects on a textured background. An object is placed again, or left out,
    where it would cover more than `1 - MIN_VISIBLE` of another one.

    Raises:
        ValueError: `size` is below 32 pixels or `seed` is negative.
    """
    if size < 32:
        raise ValueError(f"a scene needs at least 32 pixels a side, got {size}")
    rng = np.random.default_rng((_STREAM, seed))
    canvas = _background(rng, size)
    light = rng.uniform(0.0, 2.0 * np.pi)
    masks: list[NDArray[np.bool_]] = []
    labels: list[int] = []
    areas: list[int] = []
    wanted = 1 + min(int(rng.geometric(0.3)) - 1, MAX_OBJECTS - 1)
    for _ in range(wanted):
        label = int(rng.integers(len(NAMES)))
        shape = SHAPES[NAMES[label]](rng)
        for attempt in itertools.count():
            if masks and attempt == _ATTEMPTS:
                break
            placed = _place(rng, shape, size)
            if _admissible(placed.mask, masks, areas, size):
                placed.paint_on(canvas, rng, light)
                masks = [mask & ~placed.mask for mask in masks] + [placed.mask]
                labels.append(label)
                areas.append(int(placed.mask.sum()))
                break
    stack = np.stack(masks)
    return Scene(
        image=_photograph(rng, canvas),
        boxes=np.array([_extent(mask) for mask in stack], np.float32),
        labels=np.array(labels, np.int64),
        masks=stack,
    )


@dataclass(frozen=True)
class _Placed:
    """A shape at its place: `mask` bool `(size, size)`, `alpha` and frame `u`, `v` on `window`."""

    shape: Shape
    mask: NDArray[np.bool_]
    window: tuple[slice, slice]
    alpha: Array
    u: Array
    v: Array

    def paint_on(self, canvas: Array, rng: Generator, light: float) -> None:
        paint = self.shape.paint(self.u, self.v)
        h, w = self.alpha.shape
        x = np.linspace(-1.0, 1.0, w, dtype=np.float32)
        y = np.linspace(-1.0, 1.0, h, dtype=np.float32)[:, None]
        strength = rng.uniform(0.05, 0.3)
        slope = np.float32(np.cos(light)) * x + np.float32(np.sin(light)) * y
        lit = 1.0 + np.float32(strength) * slope
        under = canvas[self.window]
        under += (paint * lit[..., None] - under) * self.alpha[..., None]


def _place(rng: Generator, shape: Shape, size: int) -> _Placed:
    """Give `shape` a random rotation, scale (log-uniform) and place within the image."""
    angle = rng.uniform(-shape.turn, shape.turn)
    low, high = SCALE_RANGE
    longer = size * np.exp(rng.uniform(np.log(low), np.log(high)))
    cos, sin = np.cos(angle), np.sin(angle)
    turned = [contour @ np.array([[cos, sin], [-sin, cos]]) for contour in shape.contours]
    least, most = turned[0].min(axis=0), turned[0].max(axis=0)
    scale = longer / (most - least).max()
    corner = rng.uniform(0.0, size - (most - least) * scale)
    origin = corner - least * scale
    x0, y0 = np.floor(corner).astype(int)
    x1, y1 = np.minimum(np.ceil(corner + (most - least) * scale).astype(int) + 1, size)
    alpha = coverage([contour * scale + origin - (x0, y0) for contour in turned], y1 - y0, x1 - x0)
    dx = ((np.arange(x0, x1) + 0.5 - origin[0]) / scale).astype(np.float32)
    dy = ((np.arange(y0, y1) + 0.5 - origin[1]) / scale).astype(np.float32)[:, None]
    window = (slice(y0, y1), slice(x0, x1))
    mask = np.zeros((size, size), bool)
    mask[window] = alpha >= 0.5
    return _Placed(
        shape=shape,
        mask=mask,
        window=window,
        alpha=alpha,
        u=np.float32(cos) * dx + np.float32(sin) * dy,
        v=np.float32(cos) * dy - np.float32(sin) * dx,
    )


def _admissible(
    new: NDArray[np.bool_], masks: list[NDArray[np.bool_]], areas: list[int], size: int
) -> bool:
    """Whether `new` is in the scale range and leaves enough to see of every object behind it."""
    if not _in_scale_range(new, size):
        return False
    for mask, area in zip(masks, areas, strict=True):
        if not (mask & new).any():
            continue
        left = mask & ~new
        if left.sum() < MIN_VISIBLE * area or not _in_scale_range(left, size):
            return False
    return True


def _in_scale_range(mask: NDArray[np.bool_], size: int) -> bool:
    if not mask.any():
        return False
    x1, y1, x2, y2 = _extent(mask)
    return SCALE_RANGE[0] * size <= max(x2 - x1, y2 - y1) <= SCALE_RANGE[1] * size


def _extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The tight box x1 y1 x2 y2 (x2, y2 exclusive) of a mask with at least one pixel."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _background(rng: Generator, size: int) -> Array:
    """A texture of noise octaves over a gradient, stripes or blobs: `(size, size, 3)` in [0, 1]."""
    first, second = (colour(rng, saturation=(0.0, 0.6), value=(0.15, 0.95)) for _ in range(2))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / np.float32(size)
    angle = rng.uniform(0.0, 2.0 * np.pi)
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    kind = rng.integers(3)
    if kind == 0:
        share = along - along.min()
    elif kind == 1:
        share = 0.5 + 0.5 * np.sin(along * np.float32(2.0 * np.pi * rng.uniform(2.0, 12.0)))
    else:
        coarse = rng.random((int(rng.integers(3, 9)),) * 2, dtype=np.float32)
        share = np.clip(4.0 * _enlarge(coarse, size) - 1.5, 0.0, 1.0)
    picture = first + (second - first) * share[..., None] * np.float32(rng.uniform(0.3, 1.0))
    strength = rng.uniform(0.05, 0.3)
    for octave in range(4):
        cells = 4 * 2**octave
        grain = rng.random((cells, cells, 3), dtype=np.float32)
        if rng.random() < 0.5:
            grain = np.repeat(grain[..., :1], 3, axis=2)
        picture += (_enlarge(grain, size) - 0.5) * np.float32(strength * 0.65**octave)
    return np.ascontiguousarray(np.clip(picture, 0.0, 1.0), np.float32)


def _enlarge(grain: Array, size: int) -> Array:
    return cv2.resize(grain, (size, size), interpolation=cv2.INTER_CUBIC)


def _photograph(rng: Generator, canvas: Array) -> NDArray[np.uint8]:
    """Blur, exposure and sensor noise; then 8 bit."""
    if rng.random() < 0.3:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 0.9) * len(canvas) / 160.0)
    canvas = canvas * np.float32(rng.uniform(0.8, 1.15)) + np.float32(rng.uniform(-0.05, 0.05))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    canvas += noise * np.float32(rng.uniform(0.0, 0.03))
    return np.round(np.clip(canvas, 0.0, 1.0) * 255.0).astype(np.uint8)


def coco_annotations(scenes: list[Scene]) -> dict[str, Any]:
    """`scenes` in COCO's detection format; image ids from 1 in order, category ids `index + 1`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, start=1):
        height, width = scene.image.shape[:2]
        name = f"{number:06d}.png"
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for box, label, mask in zip(scene.boxes, scene.labels, scene.masks, strict=True):
            x1, y1, x2, y2 = (float(value) for value in box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": _run_lengths(mask),
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(NAMES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's run lengths of `mask`: every pixel and hole, where polygons through the outermost
    pixels' centres would make objects a pixel smaller."""
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def write_coco(
    folder: Path, count: int, size: int, *, first_seed: int = VALIDATION_SEED_START
) -> Path:
    """Write the scenes of `count` seeds from `first_seed` as a COCO data set.

    Args:
        folder: created where absent; receives `images/000001.png`... and `annotations.json`.
        count: images to write.
        size: side of each image, pixels.
        first_seed: the first scene's seed.

    Returns:
        The path of `annotations.json`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    scenes = [draw_scene(first_seed + index, size) for index in range(count)]
    record = coco_annotations(scenes)
    for scene, image in zip(scenes, record["images"], strict=True):
        path = folder / "images" / image["file_name"]
        if not cv2.imwrite(str(path), cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)):
            raise OSError(f"could not write {path}")
    target = folder / "annotations.json"
    # Whole or not at all: where it is, a demo that goes on takes the set for complete.
    write_atomic(target, json.dumps(record).encode())
    return target

"""The object classes of the demo scenes: an outline and a paint for each.

A class is drawn in its own frame: outlines are polygons within the unit circle, and a paint maps
the frame's coordinates to colour, so that rotation and scale are the caller's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Generator = np.random.Generator


def colour(
    rng: Generator,
    hue: tuple[float, float] = (0.0, 1.0),
    saturation: tuple[float, float] = (0.55, 1.0),
    value: tuple[float, float] = (0.5, 1.0),
) -> Array:
    """A random colour: float32 `(3,)`, RGB in [0, 1].

    `hue` (in turns, wrapping at 1), `saturation` and `value` are the ranges drawn from.
    """
    h = rng.uniform(*hue)
    s, v = rng.uniform(*saturation), rng.uniform(*value)
    sector = (np.array([5.0, 3.0, 1.0]) + 6.0 * h) % 6.0
    ramp = np.clip(np.minimum(sector, 4.0 - sector), 0.0, 1.0)
    return (v - v * s * ramp).astype(np.float32)


def _pale(rng: Generator) -> Array:
    return colour(rng, saturation=(0.0, 0.25), value=(0.8, 1.0))


def _dark(rng: Generator) -> Array:
    return colour(rng, saturation=(0.0, 0.6), value=(0.05, 0.3))


def _mix(first: Array, second: Array, share: Array) -> Array:
    """`first` where `share` `(h, w)` is 0, `second` where it is 1: `(h, w, 3)`."""
    return first + (second - first) * share[..., None]


def _polar(angle: Array, radius: Array | float) -> Array:
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=-1)


def _circle(radius: float, points: int = 64) -> Array:
    return _polar(np.linspace(0.0, 2.0 * np.pi, points, endpoint=False), radius)


@dataclass(frozen=True)
class Shape:
    """One object, ready to be drawn at any place, scale and rotation.

    Attributes:
        contours: polygons `(k, 2)` within the unit circle, x to the right and y down; where they
            overlap the even-odd rule cuts a hole.
        paint: coordinates `u`, `v` `(h, w)` in the same frame to RGB `(h, w, 3)` in [0, 1].
        turn: rotations the class is seen under, plus or minus this many radians.
    """

    contours: list[Array]
    paint: Callable[[Array, Array], Array]
    turn: float = np.pi


def _ball(rng: Generator) -> Shape:
    base, band = colour(rng), _pale(rng)
    width = rng.uniform(0.22, 0.34)

    def paint(u: Array, v: Array) -> Array:
        depth = np.sqrt(np.clip(1.0 - u * u - v * v, 0.0, 1.0))
        stripe = (np.abs(v + 0.25 * depth) < width).astype(np.float32)
        return _mix(base, band, stripe) * (0.35 + 0.65 * depth)[..., None]

    return Shape([_circle(1.0)], paint)


def _ring(rng: Generator) -> Shape:
    base = colour(rng)
    inner = rng.uniform(0.5, 0.68)

    def paint(u: Array, v: Array) -> Array:
        across = (np.hypot(u, v) - inner) / (1.0 - inner)
        return base * (1.15 - 1.3 * (across - 0.45) ** 2 * 2.0)[..., None]

    return Shape([_circle(1.0), _circle(inner)], paint)


def _star(rng: Generator) -> Shape:
    base = colour(rng, value=(0.7, 1.0))
    tip = base * np.float32(rng.uniform(0.5, 0.75))
    radius = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.4, 0.48))
    outline = _polar(np.arange(10) * np.pi / 5.0, radius)

    def paint(u: Array, v: Array) -> Array:
        # Facets: each arm is lit on one side of its axis, as a folded paper star is.
        arm = np.arctan2(u, -v) * np.float32(2.5 / np.pi)
        return _mix(base, tip, ((arm - np.floor(arm)) < 0.5).astype(np.float32))

    return Shape([outline], paint)


def _triangle(rng: Generator) -> Shape:
    border = colour(rng, hue=(-0.04, 0.06), saturation=(0.75, 1.0), value=(0.6, 1.0))
    face, mark = _pale(rng), _dark(rng)
    corners = _polar(np.arange(3) * 2.0 * np.pi / 3.0, 1.0)
    normals = -corners
    inset = rng.uniform(0.26, 0.34)

    def paint(u: Array, v: Array) -> Array:
        reach = np.max([u * np.float32(x) + v * np.float32(y) for x, y in normals], axis=0)
        bar = (np.abs(u) < 0.09) & (np.abs(v + 0.08) < 0.27)
        dot = (np.abs(u) < 0.09) & (np.abs(v - 0.28) < 0.06)
        picture = _mix(face, mark, (bar | dot).astype(np.float32))
        return np.where((reach < inset - 0.06)[..., None], picture, border)

    return Shape([corners], paint, turn=0.45)


def _cross(rng: Generator) -> Shape:
    base, edge = colour(rng), _pale(rng)
    half = rng.uniform(0.26, 0.36)
    quarter = np.array([[-half, -1.0], [half, -1.0], [half, -half]])
    turns = [
        np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        for angle in np.arange(4) * np.pi / 2.0
    ]
    outline = np.concatenate([quarter @ turn for turn in turns]) / np.hypot(half, 1.0)
    limit = np.float32(half / np.hypot(half, 1.0))
    arm = np.float32(1.0 / np.hypot(half, 1.0))

    def paint(u: Array, v: Array) -> Array:
        along, across = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
        rim = (across > 0.68 * limit) & (along > 0.68 * limit) | (along > arm - 0.32 * limit)
        return _mix(base, edge, rim.astype(np.float32))

    return Shape([outline], paint)


def _flower(rng: Generator) -> Shape:
    petal = colour(rng, hue=(0.6, 1.1), value=(0.65, 1.0))
    heart = colour(rng, hue=(0.1, 0.17), saturation=(0.7, 1.0), value=(0.8, 1.0))
    petals = int(rng.integers(5, 8))
    angle = np.linspace(0.0, 2.0 * np.pi, 96, endpoint=False)
    outline = _polar(angle, 0.52 + 0.48 * np.abs(np.cos(angle * petals / 2.0)) ** 0.8)

    def paint(u: Array, v: Array) -> Array:
        radius = np.hypot(u, v)
        leaf = petal * (0.55 + 0.5 * radius)[..., None]
        return _mix(leaf, heart, (radius < 0.33).astype(np.float32))

    return Shape([outline], paint)


def _arrow(rng: Generator) -> Shape:
    base = colour(rng)
    end = colour(rng)
    shaft, neck = rng.uniform(0.17, 0.27), rng.uniform(-0.1, 0.15)
    half = np.array([[0.0, -1.0], [0.72, neck - 0.05], [shaft, neck - 0.05], [shaft, 0.95]])
    outline = np.concatenate([half, half[:0:-1] * [-1.0, 1.0]])

    def paint(u: Array, v: Array) -> Array:
        return _mix(base, end, np.clip(0.5 + 0.5 * v, 0.0, 1.0))

    return Shape([outline], paint)


def _checker(rng: Generator) -> Shape:
    light = colour(rng, saturation=(0.0, 0.5), value=(0.8, 1.0))
    dark = colour(rng, saturation=(0.3, 1.0), value=(0.05, 0.4))
    cells = int(rng.integers(3, 6))
    side = np.sqrt(0.5)
    outline = np.array([[-side, -side], [side, -side], [side, side], [-side, side]])

    def paint(u: Array, v: Array) -> Array:
        column, row = (np.floor((t + side) * (cells / (2.0 * side))) for t in (u, v))
        return _mix(light, dark, ((column + row) % 2).astype(np.float32))

    return Shape([outline], paint)


def _brick(rng: Generator) -> Shape:
    clay = colour(rng, hue=(-0.02, 0.07), saturation=(0.5, 0.85), value=(0.45, 0.85))
    mortar = colour(rng, saturation=(0.0, 0.15), value=(0.65, 0.9))
    ratio = rng.uniform(0.42, 0.6)
    width = np.cos(np.arctan(ratio))
    height = width * ratio
    outline = np.array([[-width, -height], [width, -height], [width, height], [-width, height]])
    courses = 3

    def paint(u: Array, v: Array) -> Array:
        y = (v + height) * np.float32(courses / (2.0 * height))
        x = (u + width) * np.float32(3.0 / (2.0 * width)) + 0.5 * (np.floor(y) % 2)
        joint = (np.abs(y - np.round(y)) < 0.1) | (np.abs(x - np.round(x)) < 0.06)
        return _mix(clay, mortar, joint.astype(np.float32))

    return Shape([outline], paint)


def _moon(rng: Generator) -> Shape:
    base = colour(rng, hue=(0.1, 0.18), saturation=(0.15, 0.6), value=(0.8, 1.0))
    shade = base * np.float32(rng.uniform(0.45, 0.65))
    bite, shift = rng.uniform(0.74, 0.84), rng.uniform(0.42, 0.52)
    # The two circles meet at (x, +-y): the crescent is the outer arc and, back again, the inner.
    x = (1.0 - bite**2 + shift**2) / (2.0 * shift)
    tip = np.arctan2(np.sqrt(1.0 - x * x), x)
    dent = np.arctan2(np.sqrt(1.0 - x * x), x - shift)
    outer, inner = (
        np.linspace(tip, 2.0 * np.pi - tip, 48),
        np.linspace(2.0 * np.pi - dent, dent, 48),
    )
    outline = np.concatenate(
        [
            np.stack([np.cos(outer), np.sin(outer)], axis=1),
            np.stack([shift + bite * np.cos(inner), bite * np.sin(inner)], axis=1),
        ]
    )

    def paint(u: Array, v: Array) -> Array:
        return _mix(shade, base, np.clip(0.1 - 0.9 * u + 0.2 * v, 0.0, 1.0))

    return Shape([outline], paint)


SHAPES: dict[str, Callable[[Generator], Shape]] = {
    "ball": _ball,
    "ring": _ring,
    "star": _star,
    "triangle": _triangle,
    "cross": _cross,
    "flower": _flower,
    "arrow": _arrow,
    "checker": _checker,
    "brick": _brick,
    "moon": _moon,
}
"""Category name to the function that draws a random object of it."""

_SUPERSAMPLING = 4


def coverage(contours: list[Array], height: int, width: int) -> Array:
    """The share of each pixel inside `contours` (pixel coordinates): float32 `(height, width)`."""
    canvas = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    points = [np.round(contour * _SUPERSAMPLING - 0.5).astype(np.int32) for contour in contours]
    cv2.fillPoly(canvas, points, 255)
    small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / np.float32(255.0)

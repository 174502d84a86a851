"""Distances between label distributions, against their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.random import default_rng

from benchmarks.synthesis import label_fidelity as tool
from dfq.data.image_set import ImageSet, make_item
from dfq.data.statistics import Objects
from dfq.errors import UserError
from dfq.evaluation.label_fidelity import Fidelity, compare, jensen_shannon, wasserstein


def real(
    *images: list[tuple[int, float, float]],
    names: tuple[str, ...] = ("a", "b"),
    size: tuple[int, int] = (100, 50),
) -> ImageSet:
    """Images of (category, width, height) each, in pixels."""
    items = [
        make_item(
            Path(f"{i}.png"), size, i, [(0, 0, w, h) for _, w, h in rows], [c for c, _, _ in rows]
        )[0]
        for i, rows in enumerate(images)
    ]
    return ImageSet(Path("real"), list(names), items)


class TestJensenShannon:
    def test_bounds(self) -> None:
        assert jensen_shannon(np.array([1, 2, 3]), np.array([2, 4, 6])) == 0
        assert jensen_shannon(np.array([1, 0]), np.array([0, 5])) == 1

    def test_a_case_by_hand(self) -> None:
        # (1, 0) and (1/2, 1/2): the middle is (3/4, 1/4).
        to_middle = math.log2(4 / 3), 0.5 * math.log2(2 / 3) + 0.5 * math.log2(2)
        found = jensen_shannon(np.array([3, 0]), np.array([1, 1]))
        assert found == pytest.approx(sum(to_middle) / 2)

    def test_it_is_symmetric(self) -> None:
        p, q = default_rng(0).random((2, 9))
        assert jensen_shannon(p, q) == pytest.approx(jensen_shannon(q, p))
        assert 0 < jensen_shannon(p, q) < 1

    def test_nothing_is_no_distribution(self) -> None:
        with pytest.raises(ValueError, match="positive sum"):
            jensen_shannon(np.zeros(2), np.ones(2))


class TestWasserstein:
    def test_samples_of_one_size_are_paired_in_order(self) -> None:
        a, b = default_rng(1).normal(size=(2, 31))
        expected = np.abs(np.sort(a) - np.sort(b)).mean()
        assert wasserstein(a, b) == pytest.approx(expected)

    def test_sizes_may_differ(self) -> None:
        a, b = default_rng(2).normal(size=6), default_rng(3).normal(size=4)
        # As often as makes them equally many, they are the same distributions.
        expected = np.abs(np.sort(np.repeat(a, 2)) - np.sort(np.repeat(b, 3))).mean()
        assert wasserstein(a, b) == pytest.approx(expected)

    def test_a_shift_is_its_own_distance(self) -> None:
        a = default_rng(4).random(17)
        assert wasserstein(a, a + 2.5) == pytest.approx(2.5)
        assert wasserstein(a, a[::-1]) == 0

    def test_nothing_is_no_sample(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            wasserstein(np.zeros(0), np.ones(2))


def test_a_set_is_like_itself() -> None:
    data = real([(0, 10, 20), (1, 30, 30)], [], [(1, 40, 10)])
    assert compare(data, data) == Fidelity(0.0, 0.0, 0.0, 0.0)


def test_every_distance_by_hand() -> None:
    # On a canvas of side 100: areas 0.02 and 0.08, ratios 0.5 and 2.
    ours = real([(0, 10, 20)], [(0, 40, 20)])
    # Areas 0.04 and 0.04, ratio 1, in one image of two.
    theirs = real([(1, 20, 20), (1, 20, 20)], [])
    found = compare(ours, theirs)
    assert found.categories == 1
    assert found.area == pytest.approx((0.02 + 0.04) / 2)
    assert found.aspect == pytest.approx(math.log(2))
    assert found.count == pytest.approx(1)


def test_resolution_does_not_count() -> None:
    small = real([(0, 10, 20), (1, 30, 30)])
    large = real([(0, 40, 80), (1, 120, 120)], size=(400, 200))
    found = compare(small, large)
    assert max(found.to_dict().values()) == pytest.approx(0, abs=1e-9)


def test_categories_meet_by_name() -> None:
    rows = [(0, 10, 10), (1, 10, 10), (1, 10, 10)]
    turned = [(1 - c, w, h) for c, w, h in rows]
    assert compare(real(rows), real(turned, names=("b", "a"))).categories == 0
    # "c" is in one of them only: half of the objects are of no category of the other.
    mixed = real([(0, 10, 10), (1, 10, 10)], names=("a", "c"))
    expected = jensen_shannon(np.array([1, 1]), np.array([1, 0]))
    assert compare(mixed, real([(0, 10, 10)])).categories == pytest.approx(expected)


def test_what_cannot_be_compared() -> None:
    data = real([(0, 10, 10)])
    with pytest.raises(UserError, match="the reference holds no objects"):
        compare(data, real([]))
    with pytest.raises(UserError, match="no category name is shared"):
        compare(data, real([(0, 10, 10)], names=("x", "y")))


def test_the_table(kit: Path) -> None:
    source = str(kit / "coco-val")
    lines = tool.table([source], source).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith(f"| {source} | ")
    # A set against itself.
    assert lines[3].endswith("| 0.000 | 0.0000 | 0.000 | 0.00 |")
    one, other = tool.halves(tool.objects_of(source), 0)
    whole = Objects.of(tool.open_set(source))
    assert one.images + other.images == whole.images
    assert abs(one.images - other.images) <= 1
    assert len(one) + len(other) == len(whole)

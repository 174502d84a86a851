"""Charts: parts of a page that take its colours, alike each time, with no two ids the same."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import matplotlib
import numpy as np
import pytest
from support.pages import Page

from dfq.report import figures
from dfq.report.figures import Chart

CHARTS: dict[str, Callable[[], Chart]] = {
    "curve": lambda: figures.curve("a", "loss", [3.0, 2.0, 1.5]),
    "histogram": lambda: figures.histogram("a", "sizes", np.array([1.0, 2, 2, 9]), "pixels"),
    "one value": lambda: figures.histogram("a", "sizes", np.array([5.0]), "pixels"),
    "whole": lambda: figures.histogram("a", "n", np.array([0.0, 1, 1]), "objects", whole=True),
    "quality": lambda: figures.quality("a", "layers", [0.1, 0.2], [0.3, -0.1], 0.6),
    "bits": lambda: figures.bits("a", "bits", [8, 4, 32], [8, 8, 32]),
    "bars": lambda: figures.bars("a", "MACs", [1.0, math.nan, 2], "millions", form=".4g"),
    "ranges": lambda: figures.ranges("a", "ranges", [-0.3, math.nan], [12.0, math.nan]),
    "many": lambda: figures.ranges("a", "ranges", [-1.0] * 900, [1.0] * 900),
}


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_a_part_of_a_page(name: str) -> None:
    svg = str(CHARTS[name]().svg)
    assert svg.startswith("<svg ")
    assert svg.endswith("</svg>")
    page = Page(svg)
    assert page.open == page.wrong == []
    # Not the page's style, and nothing that is not in the page.
    assert not {"style", "script", "metadata", "image"} & set(page.tags)
    assert "http" not in svg
    assert all(one.startswith("a-") for one in page.ids)
    named = re.findall(r"url\(#([^)]*)\)", svg) + [one[1:] for one in page.addresses]
    assert named
    assert set(named) <= set(page.ids)
    # Text that can be read, in the colours of the page, none of them fixed.
    assert "text" in page.tags
    assert "var(--ink)" in svg or "var(--muted)" in svg
    assert not re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg)
    assert "$" not in svg
    assert "nan" not in svg.lower()


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_the_same_each_time_whatever_the_users_style(name: str) -> None:
    first = CHARTS[name]()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "axes.grid": False}):
        assert CHARTS[name]() == first
        # And leaves the style as it was.
        assert matplotlib.rcParams["font.size"] == 30


def test_charts_of_one_page_share_no_ids() -> None:
    pages = [Page(str(figures.curve(key, "x", [1.0, 2.0]).svg)) for key in ("one", "two")]
    assert not set(pages[0].ids) & set(pages[1].ids)


def test_words_say_the_figures() -> None:
    assert "3 to 1.5 over 3 epochs" in CHARTS["curve"]().words
    assert "2, of layer 3" in CHARTS["bars"]().words
    assert "from -0.3 to 12" in CHARTS["ranges"]().words
    assert "weights of 4 to 32 bits" in CHARTS["bits"]().words

"""Charts as vectors that take the colours of the page they stand in.

No text of others is drawn in them: what a chart is of stands in the page around it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Colours that nothing else has; in the page they are what its style says.
_VARIABLES = {
    "#0a0b01": "--ink",
    "#0a0b02": "--muted",
    "#0a0b03": "--line",
    "#0a0b04": "--series-1",
    "#0a0b05": "--series-2",
    "#0a0b06": "--series-3",
}
_INK, _MUTED, _LINE, _FIRST, _SECOND, _THIRD = _VARIABLES

_INCHES = (3.7, 2.25)
"""Small: a phone shows it at its own size, text as large as that of the page."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes:
        svg: an `<svg>` element.
        title: what it is of, plain text of ours, or escaped where it is shown.
        words: what is seen in it, in a sentence.
    """

    svg: Markup
    title: str
    words: str


@contextmanager
def drawing() -> Iterator[None]:
    """Sets matplotlib's style within the context, in place of the user's settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _chart(key: str, title: str, words: str, draw: Callable[[Axes], object]) -> Chart:
    with drawing(), matplotlib.rc_context({"svg.hashsalt": key}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        canvas.print_svg(buffer)
    return Chart(_embedded(buffer.getvalue(), key), title, words)


def _embedded(svg: str, key: str) -> Markup:
    """An SVG file as an element of a page."""
    svg = svg[svg.index("<svg") :].strip()
    # A style there would be one of the whole page, metadata hold the date, and names of parts are
    # to be unlike those of other charts.
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    rest = re.sub(r'\bid="', f'id="{key}-', rest)
    rest = re.sub(r"url\(#", f"url(#{key}-", rest)
    rest = re.sub(r'(?:xlink:)?href="#', f'href="#{key}-', rest)
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    return Markup(f'<svg {box[0]} aria-hidden="true" focusable="false">{rest}')


def _whole_numbers(axes: Axes, count: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, count + 0.5)


def curve(key: str, title: str, values: Sequence[float], of: str = "epoch") -> Chart:
    """Values by epoch, of which there are at least two."""

    def draw(axes: Axes) -> None:
        at = np.arange(1, len(values) + 1)
        axes.plot(at, values, color=_FIRST, marker="o" if len(values) <= 30 else None, ms=3)
        _whole_numbers(axes, len(values))
        axes.set_xlabel(of)

    words = f"from {values[0]:.4g} to {values[-1]:.4g} over {len(values)} {of}s"
    return _chart(key, title, words, draw)


def histogram(
    key: str, title: str, values: np.ndarray, label: str, *, whole: bool = False
) -> Chart:
    """How often values `(n,)`, of which there is at least one, occur."""

    def draw(axes: Axes) -> None:
        low, high = float(values.min()), float(values.max())
        if whole and high - low < 40:
            bins = np.arange(low - 0.5, high + 1.5)
        else:
            bins = np.linspace(low, high if high > low else low + 1, 21)
        axes.hist(values, bins=bins.tolist(), color=_FIRST, rwidth=0.9)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.set_xlabel(label)

    words = (
        f"{len(values)} values from {values.min():.4g} to {values.max():.4g}, "
        f"half of them up to {np.median(values):.4g}"
    )
    return _chart(key, title, words, draw)


def quality(
    key: str, title: str, shift: Sequence[float], spread: Sequence[float], bound: float
) -> Chart:
    """Shift and log variance ratio of each BatchNorm layer, and how far both may be."""

    def draw(axes: Axes) -> None:
        at = np.arange(1, len(shift) + 1)
        axes.axhspan(-bound, bound, color=_LINE, alpha=0.35, lw=0)
        axes.plot(at, spread, color=_FIRST, marker="o", ms=2.5, lw=1, label="ln variance ratio")
        axes.plot(at, shift, color=_SECOND, marker="s", ms=2.5, lw=1, label="shift")
        _whole_numbers(axes, len(shift))
        axes.set_xlabel("BatchNorm layer, in the order they run")
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    words = (
        f"shifts up to {max(shift):.2f}; ln of the variance ratio from {min(spread):+.2f} to "
        f"{max(spread):+.2f}; the band is up to {bound:g}"
    )
    return _chart(key, title, words, draw)


def bits(key: str, title: str, weights: Sequence[int], activations: Sequence[int]) -> Chart:
    """Bits of the weights and of the input of each layer."""

    def draw(axes: Axes) -> None:
        at = np.arange(1, len(weights) + 1)
        axes.step(at, activations, where="mid", color=_SECOND, lw=1.2, label="input")
        axes.step(at, weights, where="mid", color=_FIRST, lw=1.8, label="weights")
        _whole_numbers(axes, len(weights))
        axes.set_ylim(0, max(*weights, *activations) * 1.12)
        axes.set_xlabel("layer, in the order they run")
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    words = (
        f"weights of {_between(weights)} bits, inputs of {_between(activations)}, over "
        f"{len(weights)} layers; 32 is float"
    )
    return _chart(key, title, words, draw)


def _between(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def bars(key: str, title: str, values: Sequence[float], label: str, *, form: str) -> Chart:
    """One value a layer; what is not finite has no bar."""

    def draw(axes: Axes) -> None:
        heights = np.nan_to_num(np.array(values, float), nan=0.0)
        axes.bar(np.arange(1, len(values) + 1), heights, color=_FIRST, width=0.85, lw=0)
        _whole_numbers(axes, len(values))
        axes.set_xlabel("layer, in the order they run")
        axes.set_ylabel(label)

    most = int(np.nanargmax(values))
    words = f"the largest is {format(values[most], form)}, of layer {most + 1}"
    return _chart(key, title, words, draw)


def ranges(key: str, title: str, low: Sequence[float], high: Sequence[float]) -> Chart:
    """What the input of each layer may be, least and largest value; NaN where it is not bound."""

    def draw(axes: Axes) -> None:
        at = np.arange(1, len(low) + 1)
        axes.axhline(0, color=_MUTED, lw=0.6)
        axes.vlines(at, low, high, color=_THIRD, lw=min(4.0, 180 / len(low)))
        _whole_numbers(axes, len(low))
        # The few wide ones would leave nothing to see of the others.
        axes.set_yscale("symlog", linthresh=1.0)
        axes.autoscale_view(scalex=False)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("layer, in the order they run")

    words = f"from {np.nanmin(low):.4g} to {np.nanmax(high):.4g} over {len(low)} layers"
    return _chart(key, title, words, draw)

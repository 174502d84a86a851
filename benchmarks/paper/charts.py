"""Charts as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

MOST_CATEGORIES = 30
"""On the axis: the most frequent ones of the real set."""


def convergence(
    curves: Mapping[str, Sequence[Sequence[float]]], reference: float, file: Path
) -> None:
    """AP after each epoch: the mean over the seeds, and between the least and the greatest.

    Args:
        curves: of each method, AP by epoch of each seed.
        reference: AP of the float network.
        file: is written.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(reference, color="0.45", lw=1, ls="--", label="float")
    for title, seeds in curves.items():
        values = np.array(seeds, float)
        epochs = np.arange(1, values.shape[1] + 1)
        marker = "o" if len(epochs) <= 30 else None
        (line,) = axes.plot(epochs, values.mean(axis=0), marker=marker, ms=3.5, label=title)
        if len(values) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.18, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="AP on the real images")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # Outside: no place within is free of curves or marks whatever they are.
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)


def categories(
    real: np.ndarray, sets: Mapping[str, np.ndarray], names: Sequence[str], file: Path
) -> None:
    """How frequent categories are: bars of the real set, marks of synthetic ones.

    Args:
        real: objects of each category, `(k,)`.
        sets: the same of each synthetic set.
        names: of the categories.
        file: is written.
    """
    order = np.argsort(-real, kind="stable")[:MOST_CATEGORIES]
    figure = Figure(figsize=(max(5.0, 1.6 + 0.3 * len(order)), 4.0), layout="constrained")
    axes = figure.add_subplot()
    at = np.arange(len(order))
    axes.bar(at, real[order] / real.sum(), color="0.8", width=0.8, label="real set")
    for (title, counts), marker in zip(sets.items(), "osD^v", strict=False):
        axes.plot(at, counts[order] / counts.sum(), marker, ms=5, alpha=0.9, label=title)
    axes.set_xticks(at, [names[category] for category in order])
    axes.tick_params(axis="x", rotation=60 if len(order) > 8 else 0)
    for text in axes.get_xticklabels() if len(order) > 8 else ():
        text.set_horizontalalignment("right")
        text.set_rotation_mode("anchor")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 2):g} %"))
    axes.set_ylabel("share of all objects")
    axes.set_xlim(-0.7, len(order) - 0.3)
    axes.spines[["top", "right"]].set_visible(False)
    # Outside: no place within is free of curves or marks whatever they are.
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)

"""Tables of `networks.py`: what each kind of set makes of each network, and what tells it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr

from benchmarks.common import Row, header, line

JUDGED = "w8a8"
"""The width whose agreement the figures of a set are compared with."""

Key = tuple[str, str, int, str | None]
"""Network, source and seed of the set, width; None: the set itself."""
Results = dict[Key, Row]


def figure(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """A number as tables show it; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}"


@dataclass(frozen=True)
class Comparison:
    """One network at one width: what each kind of set makes of it, by one figure.

    Attributes:
        network, width: which.
        synthetic, photographs: the figure with each seed.
        noise: the figure with it.
    """

    network: str
    width: str
    synthetic: list[float]
    photographs: list[float]
    noise: float

    @property
    def difference(self) -> float:
        """Between the means over the seeds; below 0 where photographs are better."""
        return statistics.fmean(self.synthetic) - statistics.fmean(self.photographs)


def comparisons(
    results: Results, networks: Sequence[str], seeds: Sequence[int], what: str
) -> list[Comparison]:
    """The worst difference first, those that are not known last.

    Args:
        results: of all networks.
        networks: names of those to compare.
        seeds: of the synthetic sets and of the draws of photographs.
        what: which figure.
    """
    found = []
    for network, width in dict.fromkeys((key[0], key[3]) for key in results):
        if network not in networks or width is None:
            continue

        def value(source: str, seed: int = 0, network: str = network, width: str = width) -> float:
            known = results[network, source, seed, width].get(what)
            return math.nan if known is None else float(known)

        synthetic = [value("synthetic", seed) for seed in seeds]
        photographs = [value("photographs", seed) for seed in seeds]
        found.append(Comparison(network, width, synthetic, photographs, value("noise")))
    return sorted(found, key=lambda one: (math.isnan(one.difference), one.difference))


def table(rows: Sequence[Comparison]) -> list[str]:
    """Markdown, a line for each network and width."""
    columns = ("synthetic (each seed):", "photographs (each draw):", "noise:", "difference:")
    cells = (
        (
            row.network,
            row.width.upper(),
            _mean_and_each(row.synthetic),
            _mean_and_each(row.photographs),
            figure(row.noise),
            figure(row.difference, sign=True),
        )
        for row in rows
    )
    return [header("network", "width", *columns), *(line(*row) for row in cells)]


def _mean_and_each(values: Sequence[float]) -> str:
    return f"{figure(statistics.fmean(values))} ({', '.join(figure(value) for value in values)})"


def quality_table(results: Results) -> list[str]:
    """Markdown, a line for each set."""
    columns = ("worst ln variance ratio:", "mean:", "worst shift:", "warnings:")
    lines = [header("network", "set", *columns)]
    for (network, source, seed, width), row in results.items():
        if width is None:
            values = [row.get(f"{name}_log_variance") for name in ("worst", "mean")]
            shown = [figure(value, 2) for value in [*values, row.get("worst_shift")]]
            warnings = len(row.get("warnings", []))
            lines.append(line(network, f"{source} {seed}", *shown, warnings))
    return lines


def correlation(results: Results, what: str, sources: Collection[str]) -> tuple[float, int]:
    """Spearman's rank correlation between a figure of sets and the agreement at `JUDGED` relative
    to the mean of photographs.

    Args:
        results: of all networks.
        what: the figure.
        sources: kinds of sets that count.

    Returns:
        The coefficient, NaN where it is not defined, and of how many sets.
    """
    references: dict[str, list[float]] = {}
    for (network, source, _, width), row in results.items():
        if width == JUDGED and source == "photographs" and row["agreement"]:
            references.setdefault(network, []).append(row["agreement"])
    pairs = []
    for (network, source, seed, width), row in results.items():
        if width is not None or source not in sources or network not in references:
            continue
        agreement = results[network, source, seed, JUDGED]["agreement"]
        if agreement is not None and row.get(what) is not None:
            pairs.append((row[what], agreement / statistics.fmean(references[network])))
    if any(len(set(values)) < 2 for values in zip(*pairs, strict=True)) or not pairs:
        return math.nan, len(pairs)
    return float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)


def report(
    results: Results, networks: Sequence[str], labelled: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """All tables as Markdown.

    Args:
        results: of every network, set and width.
        networks: names.
        labelled: those of them that have an average precision on labels too.
        seeds: of the synthetic sets and of the draws of photographs.
    """
    lines = ["Agreement with the float network:", ""]
    lines += table(comparisons(results, networks, seeds, "agreement"))
    if labelled:
        lines += ["", "Average precision on labels:", ""]
        lines += table(comparisons(results, labelled, seeds, "AP"))
        floats = {key[0]: row["AP_float"] for key, row in results.items() if "AP_float" in row}
        named = ", ".join(f"{name} {figure(value)}" for name, value in floats.items())
        lines += ["", f"Float networks: {named}"]
    lines += ["", "Inputs of BatchNorm on each set, against training:", "", *quality_table(results)]
    if any(key[3] == JUDGED for key in results):
        lines += ["", f"Spearman's correlation with {JUDGED.upper()} relative to photographs:", ""]
        for title, sources in (
            ("all sets", ("synthetic", "photographs", "noise")),
            ("synthetic sets", ("synthetic",)),
        ):
            for what in ("worst", "mean"):
                value, count = correlation(results, f"{what}_log_variance", sources)
                text = figure(value, 2, sign=True)
                lines.append(f"- {what} ln variance ratio, {title} ({count}): {text}")
    return lines

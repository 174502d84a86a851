"""Faults of an exported file, by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .counting import IntegerShare
from .exported import ExportInfo
from .layouts import Candidates
from .movement import SHRUNK
from .parity import Parity
from .ranges import Fit
from .verify import Accuracy, Movement

LEAST_LEVELS = 16
"""Scores of fewer levels are of no use."""

LEAST_SHARE = 0.95
"""Of the MACs of a W8A8 file that are to be computed in integers."""

LOST = 0.2
"""Share of a tensor's energy that clipping may take away; below zero, activation functions would
have taken much of it in any case."""

SATURATED = 0.02
"""The same where only the largest integer tells of clipping: share of a tensor's values."""

FEW = 0.02
"""Share of the tensors that may clip, where the detections are what they were."""


def of_parity(parity: Parity | None) -> list[str]:
    """Outputs that are not those of the reference program."""
    if parity is None:
        return []
    faults = []
    for name, verdict in parity.held.items():
        distance = parity.outputs[name]
        if verdict is not None:
            continue
        problem = "not finite, or of another shape"
        if distance.finite:
            floor = parity.floor.get(name)
            alone = "" if floor is None else f"; rounding alone: {floor.mean_steps:.2f}"
            problem = (
                f"{distance.share_within_one:.1%} of its values within one step, "
                f"{distance.mean_steps:.2f} steps apart on average{alone}"
            )
        faults.append(f"parity: the output {name} is not what PyTorch computes ({problem})")
    return faults


def of_integers(info: ExportInfo | None, integers: IntegerShare) -> list[str]:
    """A file of dfq's that was to be computed in integers, and is not."""
    if info is None or (info.weight_bits, info.activation_bits) != (8, 8):
        return []
    if (
        info.format == "torch"
        or info.runtime == "tensorrt"
        or integers.share_of_macs >= LEAST_SHARE
    ):
        return []
    return [
        f"integers: {integers.share_of_macs:.1%} of the MACs are computed in integers, and "
        f"{LEAST_SHARE:.0%} should be"
    ]


def of_scores(candidates: Candidates, best: float) -> list[str]:
    """Scores that a grid made for boxes has taken.

    Args:
        candidates: what the file gives.
        best: highest score of the float model on the same images.
    """
    levels = np.unique(np.round(candidates.scores.astype(np.float64), 6))
    if best < 0.25 or len(levels) >= LEAST_LEVELS:
        return []
    gaps = np.diff(levels)
    if len(gaps) and gaps.min() < 1 / (2 * LEAST_LEVELS):
        return []
    zero = (
        "all its scores are zero" if not levels.any() else f"its scores have {len(levels)} levels"
    )
    return [f"one scale for boxes and scores: {zero}, and the float model's go up to {best:.2f}"]


def of_ranges(fits: Sequence[Fit] | None, moved: Movement | None) -> list[str]:
    """Grids that do not hold what the network has."""
    bad = [
        fit
        for fit in fits or ()
        if (fit.lost > LOST if fit.sqnr is not None else fit.clipped > SATURATED)
    ]
    if len(bad) <= FEW * len(fits or ()) and moved is not None and moved.as_before():
        # A tensor or two that the network can do without.
        return []
    faults = []
    in_boxes = [fit for fit in bad if fit.branch == "boxes"]
    shrunk = moved is not None and moved.side_ratio is not None and moved.side_ratio < SHRUNK
    if in_boxes or (shrunk and not bad):
        reasons = []
        if in_boxes:
            worst = max(in_boxes, key=lambda fit: (fit.lost, fit.clipped))
            reasons.append(
                f"the grid of {worst.name} ends at {worst.high:.3g}, and it goes up to "
                f"{worst.most:.3g}"
            )
        if shrunk and moved is not None:
            reasons.append(f"large boxes come out at {moved.side_ratio:.2f} of their size")
        faults.append(
            "missing or too small range in the box branch (DFL): boxes are clipped "
            f"({'; '.join(reasons)})"
        )
    others = [fit for fit in bad if fit.branch != "boxes"]
    if others and fits:
        share = float(np.mean([fit.clipped for fit in fits]))
        worst = max(others, key=lambda fit: (fit.lost, fit.clipped))
        faults.append(
            f"calibrated on noise, or ranges too small: {share:.1%} of the activations clip, "
            f"{len(bad)} of {len(fits)} tensors lose what matters (worst: {worst.name}, whose grid "
            f"ends at {worst.high:.3g} where it goes up to {worst.most:.3g})"
        )
    return faults


def of_accuracy(accuracy: Accuracy, most: float) -> list[str]:
    """More accuracy lost on the way into the runtime than may be.

    Args:
        accuracy: in the runtime and in PyTorch. Two right executions of a network differ by chance,
            on few images by more than `most`: where the interval of the difference is known, it
            has to lie below zero.
        most: that may be lost.
    """
    file, reference = accuracy.figures
    if file is None or reference is None or reference - file <= most:
        return []
    if accuracy.difference is not None and not accuracy.difference[1] < 0:
        return []
    return [
        f"accuracy: {accuracy.metric} {file:.4f} in the runtime and {reference:.4f} in PyTorch; "
        f"the drop of {reference - file:.4f} is more than {most:g}"
    ]

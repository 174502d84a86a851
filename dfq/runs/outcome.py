"""How a run ended, in words."""

from __future__ import annotations

from ..qat.trainer import Outcome
from .pipeline import FAR


def kept_sentence(selected: str, outcome: Outcome | None) -> str:
    """Which network was kept, and why that is fine, for people.

    Args:
        selected: why it is this one, as `train` says it.
        outcome: how training ended; None where there was none, or it diverged.
    """
    kind, _, reason = selected.partition(": ")
    start = "kept: the network as it was calibrated and rounded on the images, before training"
    if kind != "ptq":
        return f"kept: the trained network ({selected})"
    if reason.startswith("closest"):
        return f"kept: the network as it was before training, {reason}"
    if not reason:
        return "kept: the network as it was calibrated and rounded; no training was asked for"
    if outcome is None:
        return (
            f"{start}, because training diverged. It is complete and can be used; a lower "
            "distillation.lr may make training worth its while"
        )
    begun, ended = outcome.divergence["start"], outcome.divergence[outcome.selected]
    far = "no closer to it than it began"
    if ended > 1.05 * begun > 0:
        far = f"{ended / begun:.3g} times as far from it as it began"
    advice = "; ".join(part for part in reason.split("; ") if part.startswith("--set"))
    rule = "training is kept only where it brings the network closer to the float one"
    if outcome.best is not None:
        rule = f"no training is kept that ends more than {FAR:g} times as far from the float one"
    return (
        f"{start}. This is a complete result and no failure: {rule}, and here it ended {far}"
        f"{f' ({advice})' if advice else ''}"
    )


def divergence_sentence(outcome: Outcome) -> str:
    """What `teacher_divergence` holds, and what it means."""
    start, end = outcome.divergence["start"], outcome.divergence[outcome.selected]
    return (
        f"teacher_divergence: {start:.4g} before training, {end:.4g} after it: how far the low-bit "
        "network's predictions are from the float one's on the images it was made on, per image; "
        "0 is equal, and only values of one network and set compare"
    )


def candidates_sentence(candidates: dict[str, float], where: str) -> str:
    """Which networks were compared, and which of them was closest.

    Args:
        candidates: divergence from the float network by name.
        where: the images it is of.
    """
    ordered = sorted(candidates.items(), key=lambda pair: pair[1])
    listed = ", ".join(f"{name} {value:.4g}" for name, value in ordered)
    return f"divergence from the float network on {where}: {listed}; kept: {ordered[0][0]}"

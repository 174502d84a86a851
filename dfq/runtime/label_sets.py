"""Real sets that labels of synthetic images come from, as `synthesis.labels` names them."""

from __future__ import annotations

SET_LABELS = ("multi", "tile", "real")
"""What may stand before a colon and a real set: that categories and sizes are drawn that are as
frequent as among its labels, or that its labels are taken."""


def label_set(labels: str) -> tuple[str, str] | None:
    """Of `synthesis.labels`, one of `SET_LABELS` and the real set behind its colon; None for what
    names no set."""
    kind, colon, source = labels.partition(":")
    return (kind, source) if colon and kind in SET_LABELS else None

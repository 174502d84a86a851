"""Numbers and foreign text as the page shows them."""

from __future__ import annotations

from ..errors import shown

NOTHING = "–"
"""Where there is no figure."""


def text(value: object, limit: int = 120) -> str:
    """What a file or a user gave, on one line, no longer than `limit` characters."""
    return NOTHING if value is None else shown(value, limit)


def fixed(value: float | None, form: str = ".3f") -> str:
    """A number in a format."""
    return NOTHING if value is None else format(value, form)


def percent(value: float | None) -> str:
    """A share in [0, 1]."""
    return fixed(value, ".1%")


def amount(value: float | None) -> str:
    """A count with three digits and a prefix, as 4.27 G."""
    if value is None:
        return NOTHING
    for power, prefix in ((12, " T"), (9, " G"), (6, " M"), (3, " k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}{prefix}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:.3g}" if value != int(value) else str(int(value))


def mebibytes(value: float | None) -> str:
    """Bytes as MiB, or KiB where they are few."""
    if value is None:
        return NOTHING
    return f"{value / 2**20:.2f} MiB" if value >= 2**20 / 10 else f"{value / 2**10:.2f} KiB"

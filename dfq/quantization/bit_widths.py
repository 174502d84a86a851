"""How bit widths are written: `4` for weights and inputs alike, `w4a8` for each, `float`. Weights
have up to 8 bits, activations that 8 bits spoil up to 16."""

from __future__ import annotations

import math
import re

from ..runtime.plain import brief

Widths = tuple[int, int]
"""(weight bits, 2 to 8; activation bits, 2 to 16)."""

ALLOWED = "2 to 8, or both as w4a8, of activations up to 16 as w8a16"
"""For messages."""

_PAIR = re.compile(r"w([2-8])a([2-9]|1[0-6])")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)")
_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_widths(text: int | str) -> Widths | None:
    """(weight bits, activation bits) of `4`, `"w4a8"`; None for `"float"`.

    Raises:
        ValueError: for anything else.
    """
    if text == "float":
        return None
    if isinstance(text, int) and not isinstance(text, bool) and 2 <= text <= 8:
        return text, text
    pair = _PAIR.fullmatch(text) if isinstance(text, str) else None
    if pair is None:
        raise ValueError(f"{text!r} is no bit width: {ALLOWED}, or float")
    return int(pair[1]), int(pair[2])


def format_widths(widths: Widths) -> str:
    """`w4a8` of (4, 8)."""
    return f"w{widths[0]}a{widths[1]}"


def parse_number(text: str) -> float | None:
    """12.5e9 of `12.5G`, with k, M, G or T behind; None where it is no number."""
    number = _NUMBER.fullmatch(text)
    return float(number[1]) * _FACTORS[number[2]] if number else None


def check_budget(text: str) -> None:
    """Refuse what is neither `w4a8` nor a number.

    Raises:
        ValueError: saying what to write.
    """
    number = parse_number(text)
    if (number is None or math.isinf(number)) and not _PAIR.fullmatch(text):
        raise ValueError(
            f"{brief(text)} is no budget: write w4a8 for what that costs throughout, or a number "
            "(12.5G)"
        )

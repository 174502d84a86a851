"""What was probably meant by a name that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name that is closest to the unknown one, or nothing."""
    names = list(dict.fromkeys(known))
    lowered = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(unknown[:100].lower(), lowered, n=1, cutoff=0.7)
    return f"; did you mean {lowered[close[0]]}?" if close else ""

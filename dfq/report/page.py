"""From figures to the page: one HTML file that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from .formats import fixed, mebibytes, percent, text

_TEMPLATES = Path(__file__).parent / "templates"


def render(context: dict[str, Any]) -> bytes:
    """The page, UTF-8; equal figures give equal bytes.

    Args:
        context: what `sections` gives. All text in it is escaped here; charts are not.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # For what is shown as it was read.
    environment.filters |= {
        "foreign": text, "fixed": fixed, "percent": percent, "mebibytes": mebibytes,
    }  # fmt: skip
    return (environment.get_template("page.html").render(context) + "\n").encode()

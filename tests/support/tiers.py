"""Parameters that put single cases of a unit test into another tier."""

from __future__ import annotations

from typing import Any

import pytest


def published(name: str) -> Any:
    """A network of full size, as a parameter: not for unit tests."""
    return pytest.param(name, marks=pytest.mark.e2e)

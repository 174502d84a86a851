"""What several tests take: of `test_altered_run` and others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    """A JSON file with another value in it."""
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))

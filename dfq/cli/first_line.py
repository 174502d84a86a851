"""What a terminal shows at once: libraries take seconds to load, and nobody should wonder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

import click


class _Announcement(MetaPathFinder):
    """Finds nothing; says that PyTorch is being loaded, when it is."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name == "torch":
            sys.meta_path.remove(self)
            click.echo("loading PyTorch", err=True)


def announce_loading() -> None:
    """From now on, a terminal is told when PyTorch begins to load. Logs have no use for it."""
    if sys.stderr.isatty():
        sys.meta_path.insert(0, _Announcement())

"""Packages that share their name with a function of `dfq`: called, the package is the function."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


def make_callable(package: str, home: str) -> None:
    """Let a package be called as the function of its name.

    Args:
        package: its `__name__`.
        home: the module of `dfq` that holds the function; imported when it is called.
    """
    name = package.rpartition(".")[2]

    class Callable(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            from ..errors import for_python

            function = getattr(importlib.import_module(f"dfq.{home}"), name)
            return for_python(function)(*args, **kwargs)

    sys.modules[package].__class__ = Callable

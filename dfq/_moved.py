"""Import paths of earlier versions: they work for one release, with a line that says where to look.

`from dfq.verbs import synthesize` gives what `from dfq import synthesize` does, and warns once.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

_FACE = "dfq"

MOVED: dict[str, tuple[str, ...]] = {
    "dfq.verbs": (
        _FACE,
        "dfq.runs.loading",
        "dfq.api.synthesize",
        "dfq.api.quantize",
        "dfq.api.sensitivity",
        "dfq.api.inspect",
    ),
    "dfq.detectors": ("dfq.runs.loading", "dfq.models"),
    "dfq.detectors.base": ("dfq.models.base",),
    "dfq.run": ("dfq.runs.folder",),
    "dfq.comparison": ("dfq.runs.comparison",),
    "dfq.dataset": ("dfq.data",),
    "dfq.dataset.calibration": ("dfq.data.calibration_set",),
    "dfq.dataset.readers": ("dfq.data.readers",),
    "dfq.dataset.image_set": ("dfq.data.image_set",),
    "dfq.deploying": ("dfq.api.deploy",),
    "dfq.exporting": ("dfq.api.export",),
    "dfq.predicting": ("dfq.api.predict",),
    "dfq.verifying": ("dfq.api.verify",),
    "dfq.prediction": ("dfq.evaluation.prediction",),
    "dfq.quantization.convert": (
        "dfq.quantization.policy",
        "dfq.quantization.insertion",
        "dfq.quantization.calibration",
        "dfq.quantization.traversal",
        "dfq.graph.fold_batchnorm",
    ),
}
"""Module of an earlier version -> modules that hold today what it held."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MOVED` that are no more."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in MOVED:
            return None
        inner = any(moved.startswith(f"{name}.") for moved in MOVED)
        return importlib.machinery.ModuleSpec(name, self, is_package=inner)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        homes = MOVED[module.__name__]
        told: set[str] = set()

        def get(name: str) -> Any:
            for home in homes if not name.startswith("__") else ():
                member = getattr(importlib.import_module(home), name, None)
                if member is None:
                    continue
                if not told:
                    told.add(name)
                    warnings.warn(
                        f"{module.__name__} has moved: from {home} import {name}; the old path "
                        "works for one release",
                        FutureWarning,
                        stacklevel=2,
                    )
                return member
            raise AttributeError(f"module '{module.__name__}' has no attribute '{name}'")

        module.__getattr__ = get  # type: ignore[method-assign]


def install() -> None:
    """Let the old paths be imported from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # Last, so that modules which are there come first.
        sys.meta_path.append(_Finder())

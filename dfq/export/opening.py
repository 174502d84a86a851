"""Open an exported file in its runtime."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError, shown
from .exported import ExportedModel

SUFFIXES = (".onnx", ".xml", ".tflite", ".pt2")
"""Of exported files: ONNX, OpenVINO IR, LiteRT, and PyTorch's own exported program."""


def is_exported(path: str | Path) -> bool:
    """Whether a path is named as an exported file is."""
    return Path(path).suffix.lower() in SUFFIXES


def open_exported(path: str | Path, *, threads: int | None = None) -> ExportedModel:
    """Open an exported file in the runtime of its format.

    Args:
        path: the file; `.onnx` opens in onnxruntime, `.xml` in OpenVINO, `.tflite` in LiteRT,
            `.pt2` in PyTorch.
        threads: that the runtime may use; None: its own choice.

    Raises:
        UserError: no such file, one that is broken, of no dfq export, or whose runtime is not
            installed.
    """
    raise UserError(f"{shown(path)}: exported files cannot be opened yet")

"""Packages that are needed for one format alone, imported when it is used."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

from ..errors import UserError
from ..runtime.processes import keeping_signal_stack

_EXTRAS = {"litert_torch": "litert", "ai_edge_litert": "litert"}


def require(name: str, purpose: str) -> ModuleType:
    """An optional package or one of its modules.

    Args:
        name: as in an import.
        purpose: what it is needed for, for the message.

    Raises:
        UserError: it is not installed; says how to.
    """
    # It would write to the user's cache folder, and tell its maker of its use.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        root = name.partition(".")[0]
        if (error.name or "").partition(".")[0] != root:
            raise
        extra = _EXTRAS.get(root, "export")
        raise UserError(
            f"{purpose} needs the package {root.replace('_', '-')}, which is not installed: "
            f"pip install 'dfq[{extra}]'"
        ) from None


def compile_openvino(core: Any, model: Any, precision: str = "f32", **settings: Any) -> Any:
    """An OpenVINO model made ready for the CPU.

    Args:
        core: `openvino.Core`.
        model: `openvino.Model`.
        precision: of what is in float, as OpenVINO names it.
        settings: further properties of the CPU plugin.

    Returns:
        `openvino.CompiledModel`.
    """
    with keeping_signal_stack():
        return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision, **settings})

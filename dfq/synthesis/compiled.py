"""The C functions beside this file, compiled for the processor at hand when first needed, which
takes seconds. Without a C compiler PyTorch's own operations do the same in more passes.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SWITCH = "DFQ_KERNELS"
"""Environment variable: 0 leaves everything to PyTorch."""

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Of values, as the functions' names end; not every function is there for each of them."""

_SOURCES = ("moments.c", "pixels.c")
# OpenMP for the order of sums to be the compiler's choice, not for threads.
_FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-shared",
    "-fPIC",
)


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get(SWITCH) == "0":
        return None
    wide = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
    sources = [str(Path(__file__).with_name(name)) for name in _SOURCES]
    # Compiled by each process for itself: a cached file might meet another processor, or an enemy.
    with tempfile.TemporaryDirectory(prefix="dfq-") as folder:
        target = str(Path(folder) / "kernels.so")
        command = [compiler, *_FLAGS, *wide, *sources, "-o", target]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            return ctypes.CDLL(target)
        except (OSError, subprocess.SubprocessError):
            return None


def usable(*tensors: Tensor) -> bool:
    """Whether the functions can be had, and take tensors of these types on this device."""
    fit = all(x.device.type == "cpu" and x.dtype in TYPES and x.numel() > 0 for x in tensors)
    return fit and _library() is not None


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int) -> None:
    """Call the function `name` for values of a type, which `usable` has to have been asked before.

    Args:
        name: of the function, less the type's.
        dtype: one of `TYPES`.
        arguments: as in C, a tensor for each pointer; each dense, laid out as the function says.
    """
    function = getattr(_library(), f"{name}_of_{TYPES[dtype]}")
    function(
        *(
            ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_ssize_t(x)
            for x in arguments
        )
    )

"""The C functions beside this file, compiled for the processor at hand when first needed, which
takes seconds. Without a C compiler PyTorch's own operations do the same in more passes.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

SWITCH = "DFQ_KERNELS"
"""Environment variable: 0 leaves everything to PyTorch."""

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Of values, as the functions' names end; not every function is there for each of them."""

_ARGUMENTS = {
    "moments": (4, 2),
    "silu_and_moments": (5, 2),
    "add_linear": (5, 3),
    "silu_backward": (5, 3),
    "view": (5, 3),
    "view_backward": (4, 3),
    "variation": (4, 4),
    "halved": (3, 3),
    "add_doubled": (3, 3),
}
"""Of each function: how many pointers, then how many sizes."""

_SOURCES = ("batchnorm.c", "pixels.c")
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
    compiler = _compiler()
    if compiler is None or os.environ.get(SWITCH) == "0":
        return None
    wide = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
    sources = [str(Path(__file__).with_name(name)) for name in _SOURCES]
    try:
        # Compiled by each process for itself: a cached file might meet another processor, or an
        # enemy.
        with tempfile.TemporaryDirectory(prefix="dfq-") as folder:
            target = str(Path(folder) / "kernels.so")
            command = [*compiler, *_FLAGS, *wide, *sources, "-o", target]
            subprocess.run(
                command, check=True, capture_output=True, timeout=120, stdin=subprocess.DEVNULL
            )
            library = ctypes.CDLL(target)
        for name in _ARGUMENTS:
            library[f"{name}_of_float32"]
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None
    return library


def _compiler() -> list[str] | None:
    """The words that call a C compiler; None where there is none."""
    try:
        words = shlex.split(os.environ.get("CC") or "cc")
    except ValueError:
        return None
    return words if words and shutil.which(words[0]) else None


def why_none() -> str | None:
    """Why there are no compiled functions, for people; None where there are."""
    if _library() is not None:
        return None
    if os.environ.get(SWITCH) == "0":
        return f"no compiled functions are used, as {SWITCH} is 0"
    name = os.environ.get("CC") or "cc"
    if _compiler() is None:
        return f"there is no C compiler ({name}; CC names another)"
    return f"the C compiler ({name}; CC names another) fails"


def usable(x: Tensor) -> bool:
    """Whether the functions can be had, and take values of this type on this device."""
    return x.device.type == "cpu" and x.dtype in TYPES and x.numel() > 0 and _library() is not None


def usable_planes(images: Tensor) -> bool:
    """Whether they take images as functions of pixels do: in float32, plane by plane."""
    return images.dtype == torch.float32 and images.is_contiguous() and usable(images)


@functools.cache
def fused_pixels(device: torch.device) -> ModuleType | None:
    """The kernels for images on a GPU, where they can be had."""
    if device.type != "cuda":
        return None
    try:
        from . import fused_pixels as found
    except ImportError:
        return None
    return found if found.why_not(device) is None else None


def call(name: str, dtype: torch.dtype, tensors: Sequence[Tensor], *sizes: int) -> None:
    """Call the function `name` for values of a type, for which `usable` has to have said yes.

    Args:
        name: of the function, less the type's.
        dtype: one of `TYPES`.
        tensors: where its pointers point, each dense and laid out as the function says.
        sizes: its further arguments.
    """
    function(name, dtype)(*[x.data_ptr() for x in tensors], *sizes)


@functools.cache
def function(name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    """The function that `call` calls, which takes addresses."""
    library = _library()
    assert library is not None
    function = library[f"{name}_of_{TYPES[dtype]}"]
    pointers, sizes = _ARGUMENTS[name]
    function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_ssize_t] * sizes
    function.restype = None
    return function

"""BatchNorm statistics fused with the activation they are taken before, for CPUs.

A SiLU reads and writes what its BatchNorm gave anyway; with `kernels.c`, the mean and variance on
the way forwards, and their gradient on the way back, are taken in the same passes. That file is
compiled for the processor at hand when it is first needed, which takes a second. Without a C
compiler PyTorch's own operations do the same in more passes.
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
import torch.nn.functional as F
from torch import Tensor

SWITCH = "DFQ_KERNELS"
"""Environment variable: 0 leaves everything to PyTorch."""

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_WIDEST = 8192

_FUNCTIONS = {
    "moments": ("moments_of_{}", 4),
    "silu_and_moments": ("silu_and_moments_of_{}", 5),
    "add_linear": ("add_linear_of_{}", 5),
    "silu_backward": ("silu_backward_of_{}", 5),
}


@functools.cache
def _library() -> dict[tuple[str, torch.dtype], ctypes._NamedFuncPointer] | None:
    """The compiled functions by name and type of the values; None where they cannot be had."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get(SWITCH) == "0":
        return None
    wide = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
    # Compiled by each process for itself: a cached file might meet another processor, or an enemy.
    with tempfile.TemporaryDirectory(prefix="dfq-") as folder:
        target = str(Path(folder) / "kernels.so")
        command = [compiler, *_FLAGS, *wide, str(_SOURCE), "-o", target]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            library = ctypes.CDLL(target)
        except (OSError, subprocess.SubprocessError):
            return None
        found = {}
        for name, (symbol, pointers) in _FUNCTIONS.items():
            for dtype, of in _TYPES.items():
                function = library[symbol.format(of)]
                function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_ssize_t] * 2
                function.restype = None
                found[name, dtype] = function
        return found


def _fits(x: Tensor) -> bool:
    """Whether the compiled functions take `x` as it lies in memory."""
    return (
        x.device.type == "cpu"
        and x.dtype in _TYPES
        and x.ndim == 4
        and 0 < x.shape[1] <= _WIDEST
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and _library() is not None
    )


def _call(name: str, x: Tensor, *others: Tensor) -> None:
    library = _library()
    assert library is not None
    channels = x.shape[1]
    pointers = [tensor.data_ptr() for tensor in (x, *others)]
    library[name, x.dtype](*pointers, x.numel() // channels, channels)


def moments(x: Tensor, expected: Tensor, mean: Tensor, var: Tensor, silu: bool) -> Tensor:
    """Mean and biased variance of each channel of `x`, over all else, and `x` or its SiLU.

    Args:
        x: `(n, c, ...)`, of any floating type.
        expected: float32 `(c,)`, about the mean; the nearer, the less is lost to rounding.
        mean, var: float32 `(c,)`, dense: what is found is written there.
        silu: whether to give silu(x), or x itself.
    """
    if _fits(x):
        if not silu:
            _call("moments", x, expected, mean, var)
            return x
        out = torch.empty_like(x)
        _call("silu_and_moments", x, out, expected, mean, var)
        return out
    # The kernel BatchNorm itself uses: one pass, in float32 whatever the dtype of x.
    unused = torch.zeros_like(mean)
    found = torch.ops.aten.batch_norm_update_stats(x, unused, unused.clone(), 0.0)
    mean.copy_(found[0])
    var.copy_(found[1])
    return F.silu(x) if silu else x


def moments_backward(x: Tensor, grad: Tensor, slope: Tensor, offset: Tensor, silu: bool) -> Tensor:
    """The gradient of `x`: what `grad` says, and `slope * x + offset` for its mean and variance.

    Args:
        x: as `moments` was given it.
        grad: of what it gave.
        slope, offset: float32 `(c,)`.
        silu: as then.
    """
    if _fits(x) and grad.dtype == x.dtype:
        out = torch.empty_like(x)
        grad = grad.contiguous(memory_format=torch.channels_last)
        _call("silu_backward" if silu else "add_linear", x, grad, out, slope, offset)
        return out
    # slope * x + offset by the kernel of a BatchNorm in eval mode: it takes half-precision x with
    # float32 factors, and a broadcast addcmul is up to ten times slower on a CPU.
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    linear = torch.batch_norm(x, slope, offset, zero, one, False, 0.0, 0.0, False)
    return linear.add_(torch.ops.aten.silu_backward(grad, x) if silu else grad)

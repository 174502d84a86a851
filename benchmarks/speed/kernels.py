"""Time the C functions of `dfq.kernels` against PyTorch's operations and against `torch.compile`.

    python -m benchmarks.speed.kernels --case 160x16 --case 320x8 --dtype bfloat16

Three ways of the same function, in turns within one process after their results were found to
agree: PyTorch's operations, what dfq does without a C compiler; those compiled by inductor for the
very shape; and the C function. The statistics of a layer are also compiled as they are defined, in
elementwise operations and sums, and of both that are compiled the faster counts. Layers are those
of YOLOv5n that a BatchNorm follows; times are what all of them take in a pass, the medians of
their turns added up: of the processor, on one thread, as every process of a synthesis has. "both"
is the way forwards and the way back. Seconds to compile count every layer's shape and all that is
compiled for it, with inductor's cache empty at the start. At last, microseconds of a call on a
tensor of eight values, as a Python function and as the operation of PyTorch that it is registered
as.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from unittest import mock

import click
import torch
from torch import Tensor

from benchmarks.common import benchmark, header, in_turns, line
from benchmarks.speed.kernel_parts import (
    COMPILED,
    PLAIN,
    C,
    Compiler,
    Part,
    Way,
    layers,
    scales,
    variations,
    views,
)
from dfq.errors import UserError
from dfq.kernels import loader, operations
from dfq.runtime.malloc import freed_memory_kept

OF_PIXELS = "variation", "scales"
"""Of what is computed in float32 whatever the network computes in."""

KERNELS: dict[str, Callable[[int, int, torch.dtype, Compiler], Iterator[Part]]] = {
    "SiLU, moments": functools.partial(layers, silu=True),
    "moments": functools.partial(layers, silu=False),
    "view": views,
    "variation": variations,
    "scales": scales,
}


def agree(part: Part) -> None:
    """Raise a `UserError` where ways of a part differ in what they give."""
    ways = {name: _results(way) for name, way in part.ways.items()}
    for name, tensors in ways.items():
        for theirs, ours in zip(tensors, ways[C], strict=True):
            size = float(theirs.abs().max().clamp_min(1))
            off = float((theirs.double() - ours.double()).abs().max()) / size
            if not off <= part.tolerance:
                raise UserError(f"{name} and {C} differ by {off:g} of the largest value")


def _results(way: Way) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (way.both or way.forward)()]


def measure(part: Part, passes: str, rounds: int) -> dict[str, float]:
    """Seconds of a part by way, the faster of what is compiled; NaN where nothing could be.

    Args:
        part: whose ways take turns.
        passes: "forward" or "both".
        rounds: turns of each.
    """
    runs = {name: getattr(way, passes) for name, way in part.ways.items()}
    medians = {
        name: statistics.median(seconds)
        for name, seconds in in_turns(runs, rounds, warm=3, clock=time.process_time).items()
    }
    compiled = [seconds for name, seconds in medians.items() if name.startswith(COMPILED)]
    return {
        PLAIN: medians[PLAIN],
        COMPILED: min(compiled, default=float("nan")),
        C: medians[C],
    }


def overhead(rounds: int) -> dict[str, float]:
    """Seconds of a call that has next to nothing to compute: as a Python function, and as an
    operation of PyTorch."""
    x = torch.zeros(1, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    given = x, torch.zeros(8), torch.empty(8), torch.empty(8)
    bare = operations.implementation("moments")
    operation = operations.OPERATIONS["moments"]
    runs = {"function": lambda: bare(*given), "operation": lambda: operation(*given)}
    times = in_turns(runs, rounds, warm=100)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


@benchmark(__doc__)
@click.option(
    "--case", "cases", multiple=True, default=("160x16", "320x8"), show_default=True,
    metavar="PXxIMAGES", help="Side of the images, and how many.",
)  # fmt: skip
@click.option(
    "--dtype", "dtypes", multiple=True, default=("bfloat16", "float32"), show_default=True,
    type=click.Choice(list(loader.TYPES.values())), help="Of what the network computes in.",
)  # fmt: skip
@click.option(
    "--kernel", "kernels", multiple=True, default=tuple(KERNELS), show_default=True,
    type=click.Choice(list(KERNELS)), help="Which functions.",
)  # fmt: skip
@click.option("--rounds", default=40, show_default=True, help="Turns of each.")
def main(
    cases: tuple[str, ...],
    dtypes: tuple[str, ...],
    kernels: tuple[str, ...],
    rounds: int,
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="dfq-bench-") as folder,
        mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}),
    ):
        _run([_case(text) for text in cases], dtypes, kernels, rounds)


def _run(
    cases: list[tuple[int, int]],
    dtypes: tuple[str, ...],
    kernels: tuple[str, ...],
    rounds: int,
) -> None:
    torch.set_num_threads(1)
    missing = loader.why_none()
    if missing is not None:
        raise UserError(f"nothing to time: {missing}")
    print(f"torch {torch.__version__}, one thread, medians of {rounds} turns")
    print(f"vectors of {torch.backends.cpu.get_cpu_capability()}")
    print(header(
        "function", "dtype", "px", "images", "passes", f"{PLAIN}, ms:", f"{COMPILED}, ms:",
        f"{C}, ms:", f"{PLAIN} / {C}:", f"{COMPILED} / {C}:", "least to most:", "to compile, s:",
    ))  # fmt: skip
    for kernel in kernels:
        for dtype in dtypes if kernel not in OF_PIXELS else ("float32",):
            for side, images in cases:
                _report(kernel, getattr(torch, dtype), side, images, rounds)
    calls = overhead(100 * rounds)
    print(
        f"a call of eight values: {calls['function'] * 1e6:.1f} us as a function, "
        f"{calls['operation'] * 1e6:.1f} us as an operation"
    )


def _case(text: str) -> tuple[int, int]:
    side, _, images = text.partition("x")
    if not (side.isdecimal() and images.isdecimal() and int(side) % 32 == 0 and int(images) > 0):
        raise click.UsageError(f"--case {text}: write PXxIMAGES, PX a multiple of 32")
    return int(side), int(images)


def _report(kernel: str, dtype: torch.dtype, side: int, images: int, rounds: int) -> None:
    compiler = Compiler()
    # By passes, of each part: how often, and seconds by way.
    found: dict[str, list[tuple[int, dict[str, float]]]] = {"forward": [], "both": []}
    # As synthesis does; else large tensors would be timed for the pages they are given.
    with freed_memory_kept():
        for part in KERNELS[kernel](side, images, dtype, compiler):
            agree(part)
            for passes in ("forward",) if part.ways[C].both is None else ("forward", "both"):
                found[passes].append((part.times, measure(part, passes, rounds)))
    for passes, rows in found.items():
        if not rows:
            continue
        total = {
            name: sum(times * seconds[name] for times, seconds in rows)
            for name in (PLAIN, COMPILED, C)
        }
        ratios = [seconds[COMPILED] / seconds[C] for _, seconds in rows]
        print(line(
            kernel, loader.TYPES[dtype], side, images, passes,
            *(f"{total[name] * 1e3:.2f}" for name in (PLAIN, COMPILED, C)),
            *(f"{total[name] / total[C]:.2f}" for name in (PLAIN, COMPILED)),
            f"{min(ratios):.2f} to {max(ratios):.2f}", f"{compiler.seconds:.0f}",
        ), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

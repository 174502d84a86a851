"""The functions that `dfq.kernels` has in C, each in PyTorch's operations, compiled and in C: what
`benchmarks.speed.kernels` times."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from dfq.kernels import batchnorm
from dfq.kernels.grids import add_doubled, halved
from dfq.kernels.plain import blanked, mirrored, plain_doubled, plain_halved, plain_variation
from dfq.synthesis.augmentation import augmented_view, random_erasing
from dfq.synthesis.losses.total_variation import squared_variation

LAYERS = {
    (16, 2): 1,
    (16, 4): 4,
    (32, 4): 2,
    (32, 8): 10,
    (64, 8): 3,
    (64, 16): 18,
    (128, 16): 4,
    (128, 32): 11,
    (256, 32): 4,
}
"""Channels and stride of YOLOv5n's layers, and how many there are of each."""

Function = Callable[..., Any]
PLAIN, COMPILED, C = "PyTorch", "torch.compile", "C"


@dataclass(frozen=True)
class Way:
    """One way to compute: forward alone, then forward and backward; each gives its results."""

    forward: Callable[[], Any]
    both: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Part:
    """What is timed at once: its ways by name, and how often a pass does it."""

    ways: dict[str, Way]
    times: int = 1
    tolerance: float = 1e-4


class Compiler:
    """`torch.compile`, with the seconds that it took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def restart(self) -> None:
        """Forget what was compiled: of one function that is only so much, and all of it is looked
        through at each call."""
        torch._dynamo.reset()

    def __call__(self, function: Function, *example: Any) -> Function | None:
        """The compiled function, for arguments as those of the example; None where it cannot be
        had, which is printed."""
        compiled: Function = torch.compile(function, dynamic=False, fullgraph=True)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                # That it looks into a cached function, whose result is always the same.
                warnings.simplefilter("ignore")
                compiled(*example)
        except Exception as error:  # whatever it runs into
            print(f"torch.compile cannot: {' '.join(str(error).split())[:200]}")
            return None
        self.seconds += time.perf_counter() - start
        return compiled


def defined_moments(x: Tensor, expected: Tensor, mean: Tensor, var: Tensor, silu: bool) -> Tensor:
    """`batchnorm.moments` by its definition, which a compiler can make a single pass of."""
    values = x.float()
    away = values - expected.view(1, -1, 1, 1)
    offset = away.mean((0, 2, 3))
    mean.copy_(expected + offset)
    var.copy_(away.square().mean((0, 2, 3)) - offset.square())
    return torch.nn.functional.silu(values).to(x.dtype) if silu else x


def layers(
    side: int, images: int, dtype: torch.dtype, compiler: Compiler, silu: bool
) -> Iterator[Part]:
    """The statistics of each layer, with or without the SiLU."""
    generator = Generator().manual_seed(0)
    for (channels, stride), times in LAYERS.items():
        compiler.restart()
        shape = images, channels, side // stride, side // stride
        x, grad = (
            torch.randn(shape, generator=generator)
            .to(dtype)
            .contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        )
        slope, offset, expected = 0.1 * torch.randn(3, channels, generator=generator)
        given = x, grad, slope, offset, expected, silu
        # In bfloat16 PyTorch's operations round what they hand to each other.
        tolerance = 1e-4 if dtype == torch.float32 else 2**-5
        yield Part(_ways_of_a_layer(*given, compiler), times, tolerance)


def _ways_of_a_layer(
    x: Tensor,
    grad: Tensor,
    slope: Tensor,
    offset: Tensor,
    expected: Tensor,
    silu: bool,
    compiler: Compiler,
) -> dict[str, Way]:
    def way(moments: Function, backward: Function) -> Way:
        mean, var = torch.zeros_like(expected), torch.zeros_like(expected)

        def forward() -> tuple[Tensor, ...]:
            return moments(x, expected, mean, var, silu), mean, var

        def both() -> tuple[Tensor, ...]:
            return *forward(), backward(x, grad, slope, offset, silu)

        return Way(forward, both)

    def plain(x: Tensor, expected: Tensor, mean: Tensor, var: Tensor, silu: bool) -> Tensor:
        return batchnorm.plain_moments(x, mean, var, silu)

    plain_backward = batchnorm.plain_moments_backward
    ways = {
        PLAIN: way(plain, plain_backward),
        C: way(batchnorm.moments, batchnorm.moments_backward),
    }
    backward = compiler(plain_backward, x, grad, slope, offset, silu)
    for name, function in ((COMPILED, plain), (f"{COMPILED}, as defined", defined_moments)):
        mean, var = torch.zeros_like(expected), torch.zeros_like(expected)
        forward = compiler(function, x, expected, mean, var, silu)
        if forward is not None and backward is not None:
            ways[name] = way(forward, backward)
    return ways


class _Shown(torch.autograd.Function):
    """A view of images and the way back, each by a function."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, forward: Function, backward: Function) -> Tensor:
        ctx.way_back = backward
        return forward(pixels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.way_back(grad), None, None


def views(side: int, images: int, dtype: torch.dtype, compiler: Compiler) -> Iterator[Part]:
    """What the network is shown of images, half of them mirrored, a third erased in part."""
    compiler.restart()
    generator = Generator().manual_seed(0)
    pixels = torch.rand(images, 3, side, side, generator=generator)
    leaf = pixels.clone().requires_grad_()
    grad = torch.randn(pixels.shape, generator=generator).to(dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    flipped = torch.arange(images) % 2 == 0
    erased = random_erasing(images, side, 0.3, generator)

    def plain(pixels: Tensor) -> Tensor:
        # Channels innermost, as the convolution that comes next wants them.
        shown = blanked(mirrored(pixels, flipped), erased)
        return shown.to(dtype, memory_format=torch.channels_last)

    def plain_backward(grad: Tensor) -> Tensor:
        grad = grad.to(torch.float32, memory_format=torch.contiguous_format)
        return mirrored(blanked(grad, erased), flipped)

    def way(show: Function) -> Way:
        def both() -> tuple[Tensor, ...]:
            view = show(leaf)
            return view, *torch.autograd.grad(view, leaf, grad)

        return Way(lambda: (show(pixels),), both)

    ways = {
        PLAIN: way(lambda x: _Shown.apply(x, plain, plain_backward)),
        C: way(lambda x: augmented_view(x, flipped, erased, dtype)),
    }
    forward, backward = compiler(plain, pixels), compiler(plain_backward, grad)
    if forward is not None and backward is not None:
        ways[COMPILED] = way(lambda x: _Shown.apply(x, forward, backward))
    yield Part(ways, tolerance=0.0)


def variations(side: int, images: int, dtype: torch.dtype, compiler: Compiler) -> Iterator[Part]:
    """The squared variation of images with its gradient, which a forward pass gives."""
    compiler.restart()
    pixels = torch.rand(images, 3, side, side, generator=Generator().manual_seed(0))

    def plain(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient = plain_variation(pixels)
        inner = torch.dot(pixels.reshape(-1), gradient.reshape(-1))
        return inner / pixels.numel(), gradient, torch.linalg.vector_norm(gradient, dim=(1, 2, 3))

    ways = {PLAIN: Way(lambda: plain(pixels)), C: Way(lambda: squared_variation(pixels))}
    compiled = compiler(plain, pixels)
    if compiled is not None:
        ways[COMPILED] = Way(lambda: compiled(pixels))
    yield Part(ways)


def scales(side: int, images: int, dtype: torch.dtype, compiler: Compiler) -> Iterator[Part]:
    """A gradient summed over four coarser grids, and what these move added up on the pixels."""
    compiler.restart()
    generator = Generator().manual_seed(0)
    gradient, pixels = torch.randn(2, images, 3, side, side, generator=generator)

    def way(halve: Function, add: Function) -> Function:
        def run(gradient: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
            grids = [halve(gradient)]
            for _ in range(3):
                grids.append(halve(grids[-1]))
            coarsest = grids[-1].clone()
            for coarser, finer in zip(grids[:0:-1], grids[-2::-1], strict=True):
                add(coarser, finer)
            # Not what is there already: in every turn the same.
            return coarsest, add(grids[0], pixels.clone())

        return run

    plain = way(plain_halved, lambda grid, out: out.add_(plain_doubled(grid)))
    ways = {
        PLAIN: Way(lambda: plain(gradient, pixels)),
        C: Way(lambda: way(halved, add_doubled)(gradient, pixels)),
    }
    compiled = compiler(plain, gradient, pixels)
    if compiled is not None:
        ways[COMPILED] = Way(lambda: compiled(gradient, pixels))
    yield Part(ways, tolerance=1e-5)

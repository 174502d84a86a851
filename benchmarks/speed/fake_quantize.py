"""Time our fake quantization against PyTorch's learnable kernels and against a plain ReLU.

    python -m benchmarks.speed.fake_quantize --threads 1 --repeat 40

Forward and backward of an activation (per tensor, asymmetric, 8 bit) and of a weight (per channel,
symmetric, 4 bit). Everything runs interleaved in one process, so that a busy machine slows all of
it alike; the fastest of the repeats counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click
import torch
from torch import Tensor

from benchmarks.common import benchmark, in_turns, threads_option
from dfq.quantization.quantizers import fake_quantize, grid

Shape = tuple[int, ...]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def _candidates(channels: int, bits: int, asymmetric: bool) -> dict[str, Forward]:
    qmin, qmax = grid(bits, signed=not asymmetric)

    def ours(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        shape = (-1, *([1] * (x.ndim - 1))) if channels > 1 else (1,)
        return fake_quantize(x, scale.view(shape), zero.view(shape), qmin, qmax)

    def kernel(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if channels > 1:
            return torch._fake_quantize_learnable_per_channel_affine(
                x, scale, zero, 0, qmin, qmax, 1.0
            )
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, qmin, qmax, 1.0)

    def relu(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.relu(x)

    return {"dfq": ours, "torch learnable": kernel, "relu": relu}


def measure(
    shape: Shape, channels: int, bits: int, asymmetric: bool, *, repeat: int, device: str
) -> dict[str, float]:
    """Seconds of one forward and backward pass of each candidate, the fastest of `repeat`.

    Args:
        shape: of the tensor to quantize.
        channels: number of scales: 1, or the first of `shape`.
        bits: bit width.
        asymmetric: unsigned grid with a zero point that is learned too.
        repeat: passes of each.
        device: where.
    """
    qmin, qmax = grid(bits, signed=not asymmetric)
    x = torch.randn(shape, device=device, requires_grad=True)
    upstream = torch.randn(shape, device=device)
    # Four standard deviations to either side, as calibration would have it.
    scale = torch.full((channels,), 8.0 / (qmax - qmin), device=device, requires_grad=True)
    middle = (qmin + qmax) // 2 if asymmetric else 0
    zero = torch.full((channels,), float(middle), device=device, requires_grad=asymmetric)
    leaves = [leaf for leaf in (x, scale, zero) if leaf.requires_grad]

    def both_passes(forward: Forward) -> None:
        torch.autograd.grad(forward(x, scale, zero), leaves, upstream, allow_unused=True)

    candidates = _candidates(channels, bits, asymmetric)
    runs = {name: partial(both_passes, forward) for name, forward in candidates.items()}
    return {name: min(times) for name, times in in_turns(runs, repeat, device=device).items()}


@benchmark(__doc__)
@click.option("--batch", default=8, show_default=True, help="Images of the activation.")
@click.option("--side", default=80, show_default=True, help="Its height and width.")
@click.option("--width", default=64, show_default=True, help="Its channels.")
@click.option("--repeat", default=40, show_default=True, help="Passes of each candidate.")
@threads_option
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
def main(batch: int, side: int, width: int, repeat: int, threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cases: dict[str, tuple[Shape, int, int, bool]] = {
        "activation": ((batch, width, side, side), 1, 8, True),
        "weight": ((512, 256, 3, 3), 512, 4, False),
    }
    print(f"torch {torch.__version__}, {device}, {threads} thread(s), fastest of {repeat}")
    for name, (shape, channels, bits, asymmetric) in cases.items():
        times = measure(shape, channels, bits, asymmetric, repeat=repeat, device=device)
        kind = "asymmetric" if asymmetric else "symmetric"
        scales = f"{channels} scale" + ("s" if channels > 1 else "")
        print(f"{name} {shape}, {bits} bit, {kind}, {scales}")
        for candidate, seconds in times.items():
            print(
                f"  {candidate:<16}{seconds * 1e3:9.2f} ms"
                f"{seconds / times['dfq']:8.2f} x dfq{seconds / times['relu']:8.2f} x relu"
            )


if __name__ == "__main__":
    main()

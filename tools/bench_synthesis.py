"""Time the synthesis loop against the floor: one forward and one input-gradient backward.

    python tools/bench_synthesis.py --model yolov5n.pt --size 160 --size 320
    python tools/bench_synthesis.py --model yolo11n.yaml

The bare loop runs the same frozen network on the same batch, in the same precision, folded and laid
out the same, and takes the gradient of the sum of its outputs with respect to the images, with
PyTorch's own operations; nothing else can invert a network with less. The real loop is the
product's own: all losses, flips, erasing, clamping, Adam, logging. A third one is the bare loop on
the network as it was loaded, in float32. Freed memory is kept for all of them.
With --micro-batch the real loop takes the batch in parts. Memory is what its first two iterations
add at their peak to what the process holds (on CUDA, to what is allocated).
Rounds alternate in one process, so that a noisy machine slows all; ratios are those of the medians.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Generator, Tensor

from dfq.models import load_detector, require_detector
from dfq.models.base import Detector
from dfq.recipe import load_recipe
from dfq.runtime.malloc import freed_memory_kept
from dfq.synthesis.augmentation import initial_images
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.labels import single


def bare_loop(detector: Detector, images: Tensor, precision: str) -> Callable[[int], None]:
    """`iterations` times forward and input-gradient backward."""
    half = precision == "bfloat16"

    def run(iterations: int) -> None:
        for _ in range(iterations):
            pixels = images.clone(memory_format=torch.channels_last).requires_grad_()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
                levels = detector.levels(detector.raw(pixels))
            torch.autograd.backward(levels, [torch.ones_like(level) for level in levels])

    return run


def real_loop(inversion: Inversion, images: Tensor, labels: list[Tensor]) -> Callable[[int], None]:
    """The product's optimisation loop, with a report as often as it makes one."""

    def run(iterations: int) -> None:
        inversion.optimise(
            images,
            labels,
            iterations,
            0.1,
            Generator().manual_seed(0),
            stage="bench",
            report=lambda *_: None,
        )

    return run


def peak_memory(run: Callable[[], None], device: str) -> float:
    """Megabytes that `run` adds at its peak; NaN where the system does not say."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")

    def kilobytes(name: str) -> int:
        (line,) = (row for row in status.read_text().splitlines() if row.startswith(name))
        return int(line.split()[1])

    gc.collect()
    before = kilobytes("VmRSS:")
    reset.write_text("5")  # the peak starts anew
    run()
    return (kilobytes("VmHWM:") - before) * 1024 / 1e6


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--size", "sizes", type=int, multiple=True, default=(160, 320), show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--micro-batch", type=int, help="Images at once; all where left out.")
@click.option("--iterations", default=20, show_default=True, help="A round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="Of torch on a CPU.")
def main(
    model: str,
    sizes: tuple[int, ...],
    batch_size: int,
    micro_batch: int | None,
    iterations: int,
    rounds: int,
    device: str,
    threads: int | None,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    detector = load_detector(model, device=device)
    columns = "model, px, batch, precision, bare ms, real ms, ratio, loaded ms, ratio, real MB"
    print(f"| {columns.replace(', ', ' | ')} |")
    print("|" + " --- |" * len(columns.split(", ")))
    for size in sizes:
        chosen = [f"synthesis.image_size={size}", f"synthesis.micro_batch={micro_batch or 'null'}"]
        settings = load_recipe(None, chosen).synthesis
        generator = Generator().manual_seed(0)
        images = initial_images(batch_size, size, "uniform", generator).to(device)
        labels = single(generator, batch_size, detector.num_classes)
        inversion = Inversion(detector, settings)
        loops = [
            bare_loop(require_detector(inversion.detector), images, inversion.precision),
            real_loop(inversion, images, labels),
            bare_loop(detector, images, "float32"),
        ]
        with freed_memory_kept():
            memory = peak_memory(lambda loop=loops[1]: loop(2), device)  # type: ignore[misc]
            times: list[list[float]] = [[], [], []]
            for number in range(rounds + 1):
                for loop, spent in zip(loops, times, strict=True):
                    if device != "cpu":
                        torch.cuda.synchronize()
                    started = time.perf_counter()
                    loop(iterations)
                    if device != "cpu":
                        torch.cuda.synchronize()
                    if number:  # the first round warms up
                        spent.append((time.perf_counter() - started) / iterations * 1e3)
        bare, real, loaded = (statistics.median(spent) for spent in times)
        print(
            f"| {model.rsplit('/', 1)[-1]} | {size} | {batch_size} | {inversion.precision} | "
            f"{bare:.0f} | {real:.0f} | {real / bare:.2f} | {loaded:.0f} | {real / loaded:.2f} | "
            f"{memory:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

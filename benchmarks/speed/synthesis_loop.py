"""Time the synthesis loop against the floor: one forward and one input-gradient backward.

    python -m benchmarks.speed.synthesis_loop --model yolov5n.pt --size 160 --size 320
    python -m benchmarks.speed.synthesis_loop --model yolo11n.yaml

The bare loop runs the same frozen network on the same batch, in the same precision, folded and laid
out the same, and takes the gradient of the sum of its outputs with respect to the images, with
PyTorch's own operations; nothing else can invert a network with less. The real loop is the
product's own: all losses, flips, erasing, clamping, Adam, logging. A third one is the bare loop on
the network as it was loaded, in float32. Freed memory is kept for all of them.
With --micro-batch the real loop takes the batch in parts. Memory is what its first two iterations
add at their peak to what the process holds (on CUDA, to what is allocated).
Images a minute are those of the real loop if all of `synthesis.iterations` were at that size; a
synthesis makes half of them at half of it, and has a label stage.
Rounds alternate in one process, so that a noisy machine slows all; ratios are those of the medians.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from torch import Generator, Tensor

from benchmarks.common import benchmark, header, in_turns, line, model_option
from benchmarks.speed.bare import bare_pass
from dfq.models import load_detector
from dfq.recipe import load_recipe
from dfq.runtime.malloc import freed_memory_kept
from dfq.synthesis.augmentation import initial_images
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.labels import single


def repeated(run: Callable[[], object], iterations: int) -> Callable[[], None]:
    """A call that makes so many calls of `run`."""

    def loop() -> None:
        for _ in range(iterations):
            run()

    return loop


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


@benchmark(__doc__)
@model_option
@click.option("--size", "sizes", type=int, multiple=True, default=(160, 320), show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--micro-batch", type=int, help="Images at once; all where left out.")
@click.option("--iterations", default=20, show_default=True, help="A round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--threads", default=1, show_default=True, help="Of torch on a CPU; a synthesis has one."
)
def main(
    model: str,
    sizes: tuple[int, ...],
    batch_size: int,
    micro_batch: int | None,
    iterations: int,
    rounds: int,
    device: str,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    detector = load_detector(model, device=device)
    columns = ("bare ms:", "real ms:", "ratio:", "loaded ms:", "ratio:", "images/min:", "real MB:")
    print(header("model", "px:", "batch:", "precision", *columns))
    for size in sizes:
        chosen = [f"synthesis.image_size={size}", f"synthesis.micro_batch={micro_batch or 'null'}"]
        settings = load_recipe(None, chosen).synthesis
        generator = Generator().manual_seed(0)
        images = initial_images(batch_size, size, "uniform", generator).to(device)
        labels = single(generator, batch_size, detector.num_classes)
        inversion = Inversion(detector, settings)
        loop = real_loop(inversion, images, labels)
        bare = bare_pass(inversion.detector, images, inversion.precision)
        loaded = bare_pass(detector, images, "float32")
        runs: dict[str, Callable[[], object]] = {
            "bare": repeated(bare, iterations),
            "real": partial(loop, iterations),
            "loaded": repeated(loaded, iterations),
        }
        with freed_memory_kept():
            memory = peak_memory(partial(loop, 2), device)
            times = in_turns(runs, rounds, device=device)
        ms = {name: statistics.median(spent) / iterations * 1e3 for name, spent in times.items()}
        print(
            line(
                model.rsplit("/", 1)[-1],
                size,
                batch_size,
                inversion.precision,
                f"{ms['bare']:.0f}",
                f"{ms['real']:.0f}",
                f"{ms['real'] / ms['bare']:.2f}",
                f"{ms['loaded']:.0f}",
                f"{ms['real'] / ms['loaded']:.2f}",
                f"{batch_size * 60e3 / (ms['real'] * settings.iterations):.1f}",
                f"{memory:.0f}",
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()

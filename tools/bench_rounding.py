"""Time second-order rounding with finished blocks answering from memory, and with all computed.

    python tools/bench_rounding.py --model yolov5n.pt --data synthetic --images 32

Both round the same network on the same images, in turns; the results are compared bit for bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest import mock

import click
import torch

from dfq.data.training_images import open_training_data
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.ptq import gptq as second_order
from dfq.ptq.block_cache import BlockOutputCache
from dfq.ptq.pipeline import quantized
from dfq.recipe import load_recipe
from dfq.runtime.progress import Silent


class Computed(BlockOutputCache):
    """Remembers nothing."""

    def finish(self, name: str) -> None:
        pass


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--data", required=True, help="A calibration set.")
@click.option("--size", default=320, show_default=True)
@click.option("--images", default=32, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", type=int, help="Of torch on a CPU.")
def main(model: str, data: str, size: int, images: int, rounds: int, threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
    settings = load_recipe(
        "w4a8", [f"synthesis.image_size={size}", "quantization.reconstruction=none"]
    )
    detector = load_detector(model)
    teacher = fold(detector.clone())
    source = open_training_data(data, detector, size)
    start = quantized(
        teacher, settings.quantization.policy(), settings.quantization, source, Silent()
    )
    pixels = source.load(list(range(min(images, len(source)))))

    def rounded(kept: Callable[..., BlockOutputCache]) -> tuple[float, dict[str, torch.Tensor]]:
        student = start.clone()
        with mock.patch.object(second_order, "BlockOutputCache", kept):
            begin = time.perf_counter()
            second_order.gptq_quantize(student, teacher, pixels)
            return time.perf_counter() - begin, student.module.state_dict()

    times: dict[str, list[float]] = {"from memory": [], "computed": []}
    for _ in range(rounds):
        results = []
        for name, kept in (
            ("from memory", BlockOutputCache),
            ("computed", Computed),
        ):
            taken, state = rounded(kept)
            times[name].append(taken)
            results.append(state)
        first, second = results
        assert all(torch.equal(second[name], value) for name, value in first.items())
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.1f} s ({min(times[name]):.1f} to {max(times[name]):.1f})")
    print(f"ratio: {medians['computed'] / medians['from memory']:.2f}")


if __name__ == "__main__":
    main()

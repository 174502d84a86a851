"""Time GPTQ with outputs of rounded blocks taken from memory, and with all of them computed.

    python -m benchmarks.speed.rounding --model yolov5n.pt --data synthetic --images 32

Both round the same network on the same images, in turns; the results are compared bit for bit.
"""

from __future__ import annotations

import statistics
from functools import partial
from unittest import mock

import click
import torch

from benchmarks.common import benchmark, in_turns, model_option, threads_option
from dfq.data.training_images import open_training_data
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.ptq import gptq
from dfq.ptq.block_cache import BlockOutputCache
from dfq.ptq.pipeline import quantized
from dfq.recipe import load_recipe
from dfq.runtime.progress import Silent


class Computed(BlockOutputCache):
    """Remembers nothing."""

    def finish(self, name: str) -> None:
        pass


@benchmark(__doc__)
@model_option
@click.option("--data", required=True, help="A calibration set.")
@click.option("--size", default=320, show_default=True)
@click.option("--images", default=32, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@threads_option
def main(model: str, data: str, size: int, images: int, rounds: int, threads: int) -> None:
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

    states: dict[type[BlockOutputCache], dict[str, torch.Tensor]] = {}

    def rounded(cache: type[BlockOutputCache]) -> None:
        student = start.clone()
        with mock.patch.object(gptq, "BlockOutputCache", cache):
            gptq.gptq_quantize(student, teacher, pixels)
        states[cache] = student.module.state_dict()

    kinds = {"from memory": BlockOutputCache, "computed": Computed}
    runs = {name: partial(rounded, cache) for name, cache in kinds.items()}
    times = in_turns(runs, rounds, warm=0)
    first, second = states[BlockOutputCache], states[Computed]
    assert all(torch.equal(second[name], value) for name, value in first.items())
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.1f} s ({min(times[name]):.1f} to {max(times[name]):.1f})")
    print(f"ratio: {medians['computed'] / medians['from memory']:.2f}")


if __name__ == "__main__":
    main()

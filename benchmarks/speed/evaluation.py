"""Time `dfq eval` beside the bare network: reading images should not hold it up.

    python -m benchmarks.speed.evaluation --model yolov5n.pt --data coco-val --size 320

Images a second of the network alone on batches that are ready, of what `dfq eval` does with the
same images (reading, letterboxing, network, NMS), and of the same with fewer images read ahead; in
turns, each round a ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from unittest import mock

import click
import torch

from benchmarks.common import benchmark, header, in_turns, line, model_option, threads_option
from dfq.data.letterbox import letterboxed_batches, load_letterboxed
from dfq.data.readers import open_set
from dfq.evaluation.coco import predict
from dfq.evaluation.detection import detect_batch
from dfq.models import load_detector
from dfq.runtime import ahead


@benchmark(__doc__)
@model_option
@click.option("--data", required=True, help="Images; labels are not needed.")
@click.option("--size", type=int, show_default="the model's", help="Side in pixels.")
@click.option("--images", default=64, show_default=True, help="How many of them.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@threads_option
def main(
    model: str, data: str, size: int | None, images: int, batch_size: int, rounds: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    detector = load_detector(model)
    detector.module.eval()
    imageset = open_set(data).head(images)
    side = size or detector.image_size
    with letterboxed_batches(imageset, side, detector.stride, batch_size) as batches:
        ready = [batch for batch, _ in batches]

    def bare() -> None:
        with torch.no_grad():
            for batch in ready:
                detector.raw(batch)

    evaluated = partial(predict, detector, imageset, image_size=side, batch_size=batch_size)

    def one_thread() -> None:
        # As it was before: one thread, a batch ahead, and NMS in the network's way.
        with (
            mock.patch.object(detector, "decode_is_pure", False),
            mock.patch.object(ahead, "reading_threads", return_value=1),
            mock.patch.object(ahead, "AHEAD", 1),
        ):
            evaluated()

    def in_order() -> None:
        for group in ahead.batches_of(range(len(imageset)), batch_size):
            letterboxed, transforms = [], []
            for index in group:
                one, _, transform = load_letterboxed(imageset, [index], side, detector.stride)
                letterboxed.append(one)
                transforms += transform
            detect_batch(detector, torch.cat(letterboxed), transforms, score_threshold=0.001)

    runs: dict[str, Callable[[], object]] = {
        "bare network": bare,
        "dfq eval": evaluated,
        "as before: one thread reads, a batch ahead": one_thread,
        "read, then detect": in_order,
    }
    times = in_turns(runs, rounds)
    print(f"{len(imageset)} images, {side} px, batches of {batch_size}, {threads} thread(s)\n")
    print(header("what", "images/s:", "of bare:", "least to most:"))
    for name, taken in times.items():
        shares = [whole / part for whole, part in zip(times["bare network"], taken, strict=True)]
        print(
            line(
                name,
                f"{len(imageset) / statistics.median(taken):.1f}",
                f"{statistics.median(shares):.2f}",
                f"{min(shares):.2f} to {max(shares):.2f}",
            )
        )


if __name__ == "__main__":
    main()

"""Searches for the scales of activations against each other, by how far predictions end up from the
float network's.

    python -m benchmarks.ptq.scales --model yolov5n.pt --data set --photos coco-train

Weights have 8 bits and are rounded to the nearest level; scales are found on the images of the set
(predictions are compared on the first few), the divergence is measured on photographs
that they never saw. Prints a Markdown table: divergence per photograph, and seconds of the search.
"""

from __future__ import annotations

import time
from typing import Any

import click
import torch
import yaml
from torch import Tensor

from dfq.data.training_images import open_training_data
from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Model
from dfq.models.divergence import total_divergence
from dfq.ptq.pipeline import calibrate_and_round, images_to_prepare
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.settings import Quantization
from dfq.runs.loading import load_float
from dfq.runtime.progress import Silent

SEARCHES = (
    *("minmax", "percentile", "lsq", "mse", "cosine"),
    *("mse-output", "cosine-output", "pd"),
)

DYNAMIC = "dynamic"
"""Least and greatest value of each call, found on no set."""

DEFAULT = "default"
"""Least squares with what today's default does besides: margins, refinement, GPTQ."""


def settings(search: str, bits: int, compared: int, changed: dict[str, Any]) -> Quantization:
    """Of one row: a search by itself, or today's default; `changed` settings win."""
    own: dict[str, Any] = {"weight_bits": 8, "activation_bits": bits}
    if search != DEFAULT:
        own |= {"reconstruction": "none", "refine_images": 0 if search == "mse" else compared}
    if search == DYNAMIC:
        own["activation_ranges"] = DYNAMIC
    elif search != DEFAULT:
        own["ranges"] = search
    return Quantization.model_validate({**own, **changed})


def measured(
    teacher: Model, pixels: Tensor, photos: Tensor, section: Quantization
) -> tuple[float, float]:
    """Divergence per photograph, and seconds it took to find scales (and round)."""
    student = insert_quantizers(teacher.clone(), section.policy())
    started = time.perf_counter()
    seen = pixels[: images_to_prepare(section)]
    calibrate_and_round(student, teacher, seen, section, Silent())
    seconds = time.perf_counter() - started
    return float(total_divergence(student, teacher, photos.split(8))) / len(photos), seconds


@click.command(help=__doc__)
@click.option("--model", required=True, help="The float detector.")
@click.option("--data", required=True, help="The set that scales are found on.")
@click.option("--photos", required=True, help="Real images to measure on.")
@click.option("--count", default=32, show_default=True, help="Of these.")
@click.option("--compared", default=16, show_default=True, help="Images to compare predictions on.")
@click.option("--size", default=320, show_default=True, help="Side in pixels.")
@click.option("--bits", default="8,6,4,3,2", show_default=True, help="Of activations.")
@click.option("--searches", default=",".join((*SEARCHES, DYNAMIC, DEFAULT)), show_default=True)
@click.option("--set", "overrides", multiple=True, help="KEY=VALUE of the quantization section.")
def main(
    model: str,
    data: str,
    photos: str,
    count: int,
    compared: int,
    size: int,
    bits: str,
    searches: str,
    overrides: tuple[str, ...],
) -> None:
    changed = {key: yaml.safe_load(text) for key, _, text in (o.partition("=") for o in overrides)}
    teacher = fold(load_float(model, trust=False, device="cpu"))
    images = open_training_data(data, teacher, size)
    pixels = images.load(list(range(min(len(images), 512))))
    seen = open_training_data(photos, teacher, size).load(list(range(count)))
    widths = [int(width) for width in bits.split(",")]
    print("| search | " + " | ".join(f"A{width}" for width in widths) + " | seconds |")
    print("| --- |" + " ---: |" * (len(widths) + 1), flush=True)
    for search in searches.split(","):
        rows = [
            measured(teacher, pixels, seen, settings(search, one, compared, changed))
            for one in widths
        ]
        found = " | ".join(f"{divergence:.4g}" for divergence, _ in rows)
        times = [seconds for _, seconds in rows]
        print(f"| {search} | {found} | {min(times):.0f} to {max(times):.0f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

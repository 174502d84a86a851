"""mmdet's full-size Mask R-CNNs through every step once, with the time and memory of each.

Random weights: what is shown is that the steps run, and what they cost. Each step is a process of
its own, so that its peak of memory is its own too. Writes `table.md` into --out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

from benchmarks.common import benchmark, header, line, out_option

CONFIGS = ("mask-rcnn_r50_fpn_1x_coco", "mask-rcnn_swin-t-p4-w7_fpn_1x_coco")
IMAGES = 4


def _segmented(data: Path, out: Path) -> Path:
    """The first images of a set whose objects all have masks, as a set of its own."""
    from dfq.data.readers import open_set

    found = open_set(data).segmented()
    if found is None:
        raise click.ClickException(f"{data}: no image whose objects all have masks")
    chosen = [item for item in found.items if len(item.boxes)][:IMAGES]
    record = json.loads((data / "annotations.json").read_text())
    ids = {item.image_id for item in chosen}
    record["images"] = [row for row in record["images"] if row["id"] in ids]
    record["annotations"] = [row for row in record["annotations"] if row["image_id"] in ids]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for item in chosen:
        shutil.copy(item.path, out / "images" / item.path.name)
    (out / "annotations.json").write_text(json.dumps(record))
    return out


def _steps(config: str, out: Path, data: Path, size: int) -> dict[str, list[str]]:
    """The command line of each step."""
    synthesis = {
        "images": IMAGES,
        "batch_size": IMAGES,
        "image_size": size,
        "iterations": 2,
        "label_stage.image_size": size // 2,
        "label_stage.iterations": 3,
        "label_stage.updates": 2,
    }
    training = {
        "method": "qat",
        "quantization.calibration_images": IMAGES,
        # GPTQ of the first linear layer, with 12544 inputs, takes minutes.
        "quantization.reconstruction": "none",
        "distillation.epochs": 2,
        "distillation.batch_size": IMAGES,
    }
    made = [f"--set=synthesis.{key}={value}" for key, value in synthesis.items()]
    trained = [f"--set={key}={value}" for key, value in training.items()]
    model, run = ["--model", config], ["--model", str(out / "run")]
    return {
        "synthesis, one shard": [
            "synthesize", *model, "--recipe=w8a8", "--workers=1", *made, "--out", str(out / "set")
        ],
        "QAT, two steps": [
            "qat", *model, "--recipe=w8a8", "--data", str(out / "set"), *made, *trained,
            "--out", str(out / "run"),
        ],
        f"evaluation, {IMAGES} images": [
            "eval", *run, "--data", str(data), "--image-size", str(size)
        ],
        "inspect": ["inspect", *run],
    }  # fmt: skip


def _measured(words: list[str], log: Path) -> tuple[float, float, float]:
    """Seconds, seconds of the CPU, and peak gigabytes of one command; `log` gets its output."""
    began = time.monotonic()
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "dfq", *words], stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise click.ClickException(f"dfq {words[0]} failed:\n{log.read_text()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
    busy = usage.ru_utime + usage.ru_stime
    return time.monotonic() - began, busy, usage.ru_maxrss * unit / 1e9


@benchmark(__doc__)
@out_option
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--size", default=320, show_default=True, help="Side of all images, pixels.")
@click.option("--config", "configs", multiple=True, default=CONFIGS, show_default=True)
def main(out: Path, data: Path, size: int, configs: tuple[str, ...]) -> None:
    few = _segmented(data, out / "few")
    rows = []
    for config in configs:
        place = out / config
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for step, words in _steps(config, place, few, size).items():
            seconds, busy, memory = _measured(words, place / f"{words[0]}.log")
            rows.append(line(config, step, f"{seconds:.0f}", f"{busy:.0f}", f"{memory:.1f}"))
            click.echo(rows[-1])
            if words[0] in ("eval", "inspect"):
                click.echo("\n".join((place / f"{words[0]}.log").read_text().splitlines()[-12:]))
    columns = header("network", "step", "seconds:", "CPU seconds:", "peak memory, GB:")
    (out / "table.md").write_text("\n".join([columns, *rows]) + "\n")


if __name__ == "__main__":
    main()

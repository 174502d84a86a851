"""Train, ship and measure the demo detector: a narrow YOLO11 on procedurally drawn scenes.

Train (about 15 minutes on two CPU cores) and write `dfq/demo/detector.safetensors`:

    python -m scripts.train_demo_detector --work build/demo-detector --bfloat16

Measure the shipped file (COCO AP, ultralytics' own decoder and NMS, scenes it never saw):

    python -m scripts.train_demo_detector --evaluate 200

It prints AP 0.733 and AP50 0.915. The shipped network saw 24,000 scenes five times; its first pass
was in fp32 and under a cosine of ten, so the command above gives a close relative, not the same
bytes.

The loop here stands in for ultralytics' trainer: it takes the scenes from memory, without files,
mosaic or colour changes, which drawn scenes do not need. Network, loss and weight averaging are
ultralytics' own.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import ModelEMA

from dfq.demo import demo_weights
from dfq.demo.scenes import TRAINING_SEED_START, VALIDATION_SEED_START
from scripts.demo_detector import IMAGE_SIZE, architecture, draw, evaluate, rebuild, ship

MONITOR_SCENES = 200
"""Scenes watched while training: the last seeds of the training range, which are not trained on."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        scenes: training scenes, drawn once and kept in memory.
        epochs: passes over them.
        batch: images a step.
        learning_rate: AdamW's, at the top of the cosine.
        bfloat16: compute the network (not its loss) in bfloat16: 1.4 times as fast on CPUs that
            have the instructions, slower on others.
        warmup: steps over which the learning rate rises from 0.
        weight_decay: AdamW's, on kernels only.
        floor: the learning rate at the end, as a share of `learning_rate`.
    """

    scenes: int
    epochs: int
    batch: int
    learning_rate: float
    bfloat16: bool = False
    warmup: int = 300
    weight_decay: float = 0.02
    floor: float = 0.01

    @property
    def steps_per_epoch(self) -> int:
        return self.scenes // self.batch

    def rate(self, step: int) -> float:
        """The learning rate of `step` (from 0): linear rise, then a cosine down to `floor`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps_per_epoch * self.epochs - self.warmup)
        cosine = 0.5 + 0.5 * math.cos(math.pi * done)
        return self.learning_rate * (self.floor + (1.0 - self.floor) * cosine)


def _draw_labelled(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The image of `seed` and its labels float32 `(n, 5)`: category, normalised cx, cy, w, h."""
    scene = draw(seed)
    low, high = scene.boxes[:, :2], scene.boxes[:, 2:]
    boxes = np.concatenate([(low + high) / 2.0, high - low], axis=1) / IMAGE_SIZE
    return scene.image, np.concatenate([scene.labels[:, None], boxes], axis=1).astype(np.float32)


class Pool:
    """The training scenes in memory: images uint8 `(n, 3, S, S)`, labels one `(n_i, 5)` each."""

    def __init__(self, count: int, workers: int) -> None:
        if count > VALIDATION_SEED_START - MONITOR_SCENES - TRAINING_SEED_START:
            raise click.BadParameter("more scenes than the training range has seeds")
        self.images = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        self.labels: list[Tensor] = []
        seeds = range(TRAINING_SEED_START, TRAINING_SEED_START + count)
        with multiprocessing.get_context("spawn").Pool(workers) as processes:
            drawn = processes.imap(_draw_labelled, seeds, chunksize=64)
            for index, (image, labels) in enumerate(drawn):
                self.images[index] = torch.from_numpy(image).permute(2, 0, 1)
                self.labels.append(torch.from_numpy(labels))

    def batches(self, batch: int, epoch: int) -> Iterator[dict[str, Tensor]]:
        """One shuffled pass in ultralytics' batch format, half of the images mirrored."""
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            mirrored = torch.rand(batch, generator=generator) < 0.5
            images = self.images[chosen]
            images[mirrored] = images[mirrored].flip(3)
            labels = [self.labels[int(index)].clone() for index in chosen]
            for label, mirror in zip(labels, mirrored, strict=True):
                if mirror:
                    label[:, 1] = 1.0 - label[:, 1]
            flat = torch.cat(labels)
            owner = torch.repeat_interleave(
                torch.arange(batch), torch.tensor([len(label) for label in labels])
            )
            yield {
                "img": (images.float() / 255.0).contiguous(memory_format=torch.channels_last),
                "batch_idx": owner.float(),
                "cls": flat[:, :1],
                "bboxes": flat[:, 1:],
            }


def _optimizer(model: DetectionModel, schedule: Schedule) -> torch.optim.AdamW:
    kernels = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": kernels, "weight_decay": schedule.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate)


def train(schedule: Schedule, work: Path, threads: int) -> DetectionModel:
    """Train from scratch, or go on from the last epoch saved in `work`; the averaged network."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = DetectionModel(architecture(), verbose=False).to(memory_format=torch.channels_last)
    model.args = get_cfg()
    optimizer = _optimizer(model, schedule)
    average = ModelEMA(model, decay=0.999, tau=500)
    checkpoint, first = work / "checkpoint.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.ema.load_state_dict(state["average"])
        average.updates = state["updates"]
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    began = time.monotonic()
    pool = Pool(schedule.scenes, threads)
    click.echo(f"drew {schedule.scenes} scenes in {time.monotonic() - began:.0f} s")
    for epoch in range(first, schedule.epochs):
        losses = _one_epoch(model, optimizer, average, pool, schedule, epoch)
        state = {
            "model": model.state_dict(),
            "average": average.ema.state_dict(),
            "updates": average.updates,
            "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        ap, ap50 = evaluate(average.ema, VALIDATION_SEED_START - MONITOR_SCENES, MONITOR_SCENES)
        box, category, distance = (losses / schedule.batch).tolist()
        click.echo(
            f"epoch {epoch + 1}/{schedule.epochs}  {time.monotonic() - began:.0f} s  box {box:.3f}"
            f"  cls {category:.3f}  dfl {distance:.3f}  monitor AP {ap:.3f}  AP50 {ap50:.3f}"
        )
    return average.ema


def _to_float(predictions: Any) -> Any:
    """The head's nested output in fp32: boxes in bfloat16 would be off by parts of a pixel."""
    if isinstance(predictions, dict):
        return {name: _to_float(value) for name, value in predictions.items()}
    if isinstance(predictions, list | tuple):
        return [_to_float(value) for value in predictions]
    return predictions.float()


def _one_epoch(
    model: DetectionModel,
    optimizer: torch.optim.AdamW,
    average: ModelEMA,
    pool: Pool,
    schedule: Schedule,
    epoch: int,
) -> Tensor:
    """One pass; returns the mean of the loss terms (box, class, distribution) `(3,)`."""
    model.train()
    total = torch.zeros(3)
    for index, batch in enumerate(pool.batches(schedule.batch, epoch)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(epoch * schedule.steps_per_epoch + index)
        with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bfloat16):
            predictions = model(batch["img"])
        terms, _ = model.loss(batch, _to_float(predictions))
        optimizer.zero_grad(set_to_none=True)
        terms.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        average.update(model)
        total += terms.detach()
    return total / schedule.steps_per_epoch


@click.command(help=(__doc__ or "").split("\n", maxsplit=1)[0])
@click.option(
    "--family",
    type=click.Choice(["demo", "mask-rcnn-resnet", "mask-rcnn-swin", "faster-rcnn-mobilenetv2"]),
    default="demo",
    show_default=True,
    help="The demo detector, or one of scripts/small_rcnn.py (which want --work and --output).",
)
@click.option(
    "--evaluate",
    "scenes_to_measure",
    type=click.IntRange(1),
    metavar="N",
    help="Measure --output on N validation scenes and train nothing.",
)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the checkpoint; training goes on from one found there.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=demo_weights(),
    help="The weights file.",
)
@click.option("--scenes", default=24_000, show_default=True, help="Training scenes.")
@click.option("--epochs", default=5, show_default=True)
@click.option("--batch", default=32, show_default=True)
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--bfloat16", is_flag=True, help="Compute the network in bfloat16.")
@click.option("--threads", default=2, show_default=True, help="CPU threads.")
def main(
    family: str,
    scenes_to_measure: int | None,
    work: Path | None,
    output: Path,
    scenes: int,
    epochs: int,
    batch: int,
    learning_rate: float,
    bfloat16: bool,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    if family != "demo":
        if work is None or output == demo_weights():
            raise click.UsageError(f"{family}: name --work, a folder, and --output, a file")
        _train_small(family, work, output, scenes, epochs, batch, learning_rate)
        return
    if scenes_to_measure is None:
        if work is None:
            raise click.UsageError("name a folder for checkpoints with --work, or use --evaluate N")
        schedule = Schedule(scenes, epochs, batch, learning_rate, bfloat16)
        ship(train(schedule, work, threads), output)
        scenes_to_measure = 200
    ap, ap50 = evaluate(rebuild(output), VALIDATION_SEED_START, scenes_to_measure)
    size = output.stat().st_size / 1e6
    click.echo(f"{output.name} ({size:.2f} MB) on {scenes_to_measure} validation scenes")
    click.echo(f"AP {ap:.4f}  AP50 {ap50:.4f}")


def _train_small(
    family: str,
    work: Path,
    output: Path,
    scenes: int,
    epochs: int,
    batch: int,
    learning_rate: float,
) -> None:
    import dfq
    from dfq.demo import write_coco
    from scripts.small_rcnn import SIDE, train_rcnn

    train_rcnn(
        family, work, output,
        scenes=scenes, epochs=epochs, batch=batch, learning_rate=learning_rate,
    )  # fmt: skip
    write_coco(work / "scenes", MONITOR_SCENES, SIDE)
    found = dfq.evaluate(str(output), work / "scenes")
    click.echo(f"AP {found.AP:.4f}  AP50 {found.AP50:.4f} on {MONITOR_SCENES} validation scenes")


if __name__ == "__main__":
    main()

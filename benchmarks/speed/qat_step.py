"""Time a training step of the low-bit network against one of the float network.

    python -m benchmarks.speed.qat_step --model yolov5n.pt --size 320 --batch 8 --threads 1

Both run the same teacher, the same loss, the same optimizer, and take turns in one process, so that
a busy machine slows both alike; the medians over the rounds are compared.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import click
import torch
from torch import Generator, Tensor

from benchmarks.common import benchmark, in_turns, model_option, set_option, threads_option
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.models.base import Detector, Targets
from dfq.qat.trainer import Trainer
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.recipe import load_recipe


class Noise:
    """Smooth random images, one box each."""

    def __init__(self, count: int, size: int) -> None:
        generator = Generator().manual_seed(0)
        coarse = torch.rand(count, 3, size // 8, size // 8, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        self.images = (smooth * 255).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: list[int]) -> Tensor:
        return self.images[indices]

    def targets(self, indices: list[int]) -> Targets:
        return Targets.from_per_image([torch.tensor([[0, 0.5, 0.5, 0.4, 0.4]]) for _ in indices])


class Stepper:
    """One trainer, a step at a time."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.number = trainer, 0
        self.feature_hooks = trainer.feature_hooks()
        self.generator = Generator().manual_seed(0)
        self.chosen = list(range(trainer.batch_size))

    def __call__(self) -> None:
        self.trainer.step(self.number, self.chosen, self.generator, *self.feature_hooks)
        self.number += 1


@benchmark(__doc__)
@model_option
@click.option("--size", default=320, show_default=True, help="Side of the images.")
@click.option("--batch", default=8, show_default=True, help="Images a step.")
@click.option("--rounds", default=12, show_default=True, help="Steps of each.")
@threads_option
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--recipe", default="w4a8", show_default=True, help="File or shipped recipe.")
@set_option
@click.option("--profile", is_flag=True, help="Print where a step of the low-bit network goes.")
def main(
    model: str,
    size: int,
    batch: int,
    rounds: int,
    threads: int,
    device: str,
    recipe: str,
    overrides: tuple[str, ...],
    profile: bool,
) -> None:
    torch.set_num_threads(threads)
    settings = load_recipe(recipe, [f"distillation.batch_size={batch}", *overrides])
    data = Noise(batch, size)
    teacher = fold(load_detector(model, device=device))
    student = insert_quantizers(teacher.clone(), settings.quantization.policy())
    calibrate(student, [data.images.float() / 255], search="minmax")

    def stepper(network: Detector) -> Stepper:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                network, teacher.clone(), data, settings.distillation, seed=0, folder=Path(folder)
            )
        return Stepper(trainer)

    steps = {"float": stepper(teacher.clone()), recipe: stepper(student)}
    if profile:
        for _ in range(2):
            steps[recipe]()
        with torch.profiler.profile() as found:
            steps[recipe]()
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
        return
    times = in_turns(steps, rounds, warm=2, device=device)
    print(f"torch {torch.__version__}, {device}, {threads} thread(s), {batch} images of {size} px")
    for name, seconds_of in times.items():
        print(f"  {name:<8}{statistics.median(seconds_of) * 1e3:9.1f} ms a step")
    ratios = [ours / theirs for ours, theirs in zip(times[recipe], times["float"], strict=True)]
    low, middle, high = (statistics.quantiles(ratios, n=20)[i] for i in (0, 9, 18))
    print(f"  ratio   {middle:9.2f} (90 % of the rounds in {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()

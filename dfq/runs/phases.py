"""The phases of making a low-bit network and how long each will take, from a short timing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Generator, Tensor

from ..evaluation.measuring import RealSet
from ..models.base import Model, Targets
from ..ptq.expected import (
    calibration_seconds,
    ranges_seconds,
    reconstruction_seconds,
    rounding_seconds,
)
from ..ptq.pipeline import reconstructs_blocks, starts_from_gptq
from ..ptq.rates import Rates, Stopwatch, measure_rates
from ..ptq.variety import copies, sees_other_worlds
from ..qat.trainer import Trainer
from ..quantization.insertion import insert_quantizers
from ..quantization.settings import Quantization
from ..recipe import Recipe
from ..runtime.forecast import Phase

TIMED_IMAGES = 4
"""Images that are timed: few, to take little of the time that is told, and enough that what each
pass takes beside its images does not count."""

DETECTED = 1.2
"""Passes of a network that an image of a real set takes, with its reading and decoding."""


class Noise:
    """A set of noise, an object in each image: what is in images does not count where they are
    timed.

    Args:
        side: pixels.
    """

    def __init__(self, side: int) -> None:
        draw = Generator().manual_seed(0)
        shape = (TIMED_IMAGES, 3, side, side)
        self._pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)

    def __len__(self) -> int:
        return TIMED_IMAGES

    def load(self, indices: list[int]) -> Tensor:
        """uint8 `(n, 3, side, side)`."""
        return self._pixels[indices]

    def targets(self, indices: list[int]) -> Targets:
        """One object each, half as wide and high as the image."""
        return Targets.from_per_image([torch.tensor([[0, 0.5, 0.5, 0.5, 0.5]]) for _ in indices])


def quantization_phases(
    teacher: Model,
    recipe: Recipe,
    side: int,
    *,
    trained: int,
    calibrated: int,
    held_out: int = 0,
    processes: int = 1,
    measured_on: RealSet | None = None,
    selected_on: RealSet | None = None,
    photos: int = 0,
    watch: Stopwatch | None = None,
) -> list[Phase]:
    """What `ptq_then_qat` and the measurements after it go through, as their tasks are called.

    Args:
        teacher: the folded float network; nothing is done to it.
        recipe: the experiment.
        side: of the images, pixels.
        trained, calibrated, held_out: images to train on, to calibrate and round on, and to
            compare on.
        processes: that share each batch of the training.
        measured_on, selected_on: labelled real sets; None: none.
        photos: real images to compare on.
        watch: what to time with; None: the time of day.
    """
    watch = watch or Stopwatch(teacher.device)
    section, noise = recipe.quantization, Noise(side)
    student = insert_quantizers(teacher.clone(), section.policy())
    rates = measure_rates(student, teacher, noise.load(list(range(len(noise)))), section, watch)
    # Real images are larger or smaller than those of the set.
    larger = ((recipe.evaluation.image_size or teacher.image_size) / side) ** 2 * DETECTED
    float_image, quantized_image = larger * rates.forward, larger * rates.student
    phases: list[Phase] = []
    if section.mixed.budget is not None:
        phases.append(("sensitivity", None))
    phases += _ptq_phases(rates, student, section, calibrated)
    if reconstructs_blocks(section):
        images = min(section.rounding_images, calibrated)
        if held_out and recipe.method == "auto" and not starts_from_gptq(section):
            # What the reconstruction is compared with.
            plain = section.model_copy(update={"reconstruction": "gptq"})
            phases += _ptq_phases(rates, student, plain, calibrated)
        learning = reconstruction_seconds(rates, student, section, images)
        phases.append(("reconstruction", learning))
    if recipe.method != "ptq":
        epochs = recipe.distillation.epochs
        epoch = trained / processes * training_seconds(student, teacher, recipe, noise, watch)
        epoch += len(selected_on or ()) * quantized_image
        # The networks' distance is looked at before and after, the averaged weights' too.
        apart = trained / processes * (rates.forward + rates.student + rates.divergence)
        phases.append(("training", [epoch + 3 * apart / epochs] * epochs))
    for work, count in (("agreement", photos), ("evaluation", len(measured_on or ()))):
        phases += [(work, [image] * count) for image in (float_image, quantized_image) if count]
    return phases


def _ptq_phases(
    rates: Rates, student: Model, section: Quantization, calibrated: int
) -> list[Phase]:
    phases: list[Phase] = [("calibration", calibration_seconds(rates, section, calibrated))]
    ranges = ranges_seconds(rates, section, calibrated)
    if ranges:
        phases.append(("ranges", ranges))
    if section.reconstruction == "gptq" or starts_from_gptq(section):
        images = min(section.rounding_images, calibrated)
        images += copies(images) if sees_other_worlds(student, section) else 0
        phases.append(("rounding", rounding_seconds(rates, student.blocks(), images)))
    return phases


def training_seconds(
    student: Model, teacher: Model, recipe: Recipe, noise: Noise, watch: Stopwatch
) -> float:
    """Seconds of an image in a step of the training.

    Args:
        student: calibrated; trained for two steps, in place.
        teacher: the folded float network; a copy is followed, as training lays it out anew.
        recipe: the experiment.
        noise: the images.
        watch: what to time with.
    """
    # Nothing is saved.
    trainer = Trainer(
        student,
        teacher.clone(),
        noise,
        recipe.distillation,
        seed=0,
        folder=Path(),
        masks=recipe.synthesis.masks,
    )
    indices, draw = list(range(len(noise))), Generator().manual_seed(0)
    ours, theirs = trainer.feature_hooks()
    try:
        # The first readies what later ones find ready.
        trainer.step(0, indices, draw, ours, theirs)
        return watch(lambda: trainer.step(0, indices, draw, ours, theirs)) / len(noise)
    finally:
        ours.close()
        theirs.close()

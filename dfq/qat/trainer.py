"""The QAT loop: a low-bit student follows its float teacher on the calibration set."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from ..data.augment import augment, camera, jitter_colours, mosaic
from ..data.pixels import LabelledImages
from ..errors import DivergedError, UserError
from ..models.base import Model, Targets
from ..models.divergence import total_divergence
from ..runtime.distributed import World
from ..runtime.files import write_atomic
from ..runtime.precision import resolve_precision
from .averaging import BestCheckpoint, ExponentialMovingAverage
from .collectives import add_up_gradients, batch_variances
from .features import distilled_layers
from .frozen_integers import FrozenIntegers, frozen_layers
from .losses import FeatureHooks, training_terms
from .parameter_groups import (
    keep_zero_points_on_grids,
    parameter_groups,
    rate_at,
    require_gradients,
    trained_zero_points,
)
from .settings import Distillation

Report = Callable[[int, int, dict[str, float]], None]
"""Called after each epoch with epochs done, epochs in all, and the epoch's mean loss terms."""

Within = Callable[[int, float], None]
"""Called before each step with the epochs done, and the share of the next one that is."""


@dataclass(frozen=True)
class Outcome:
    """How the training ended.

    Attributes:
        selected: "ema", "last" or "best" (see `best`): which weights the student now has.
        divergence: that from the teacher on the set (lower is closer) at the calibrated start
            and of each candidate; no real image is looked at.
        history: mean loss terms by epoch, and what the evaluator said where there is one.
        best: epoch (from 1) and score of the weights that the evaluator liked most; None: there
            is no evaluator.
    """

    selected: str
    divergence: dict[str, float]
    history: list[dict[str, float]]
    best: tuple[int, float] | None = None


class Trainer:
    """Trains a quantized student, resumable at every checkpoint to the same result.

    Several processes share each batch out among them and step alike. The result is that of one
    process but for the last bits, except that the task term is normalised within each share, as
    data-parallel training of detectors has it.

    Args:
        student: quantizers inserted and calibrated.
        teacher: the float detector, frozen.
        data: the calibration set.
        settings: the `distillation` section of a recipe.
        seed: fixes order and augmentation.
        folder: where `checkpoint.pt` lives while training runs; all processes see it.
        world: the processes that train together, each of which makes the same trainer; None: alone.
        masks: what the mask term of the task loss compares with; `Model.mask_targets`.
        evaluator: scores the student after each epoch, the higher the better; the epoch it likes
            most is kept, whatever `settings.selection` says of the last. Asked in the main process
            alone. None: weights are selected without it.
    """

    def __init__(
        self,
        student: Model,
        teacher: Model,
        data: LabelledImages,
        settings: Distillation,
        *,
        seed: int,
        folder: Path,
        world: World | None = None,
        masks: Literal["ellipse", "own", "none"] = "ellipse",
        evaluator: Callable[[Any], float] | None = None,
    ) -> None:
        self.student, self.teacher, self.data = student, teacher, data
        student.mask_targets = masks
        self.world = world or World()
        # Convolutions on a CPU and tensor cores both want the channels last.
        for detector in (student, teacher):
            detector.module.to(memory_format=torch.channels_last)
        self.settings, self.seed = settings, seed
        self.precision = resolve_precision(settings.precision, student.device, "distillation")
        self.checkpoint = folder / "checkpoint.pt"
        self.batch_size = min(settings.batch_size, len(data))
        # The last, smaller batch of an epoch is trained on too: no image is left out.
        self.steps = math.ceil(len(data) / self.batch_size)
        # Few enough to keep in memory as bytes: 2,000 images of 640 px are 2.3 GiB.
        self.images = data.load(list(range(len(data))))
        frozen = frozen_layers(student, settings)
        require_gradients(student.module, frozen, zero_points=settings.zero_lr > 0)
        # What these weights were rounded to stays: their step sizes alone are trained.
        self.frozen = FrozenIntegers(frozen)
        self.optimizer = torch.optim.Adam(
            parameter_groups(student.module, settings), fused=True, betas=(0.9, 0.999)
        )
        self.average = ExponentialMovingAverage(student.module, settings.ema)
        self.zero_points = trained_zero_points(student.module)
        self.evaluator = evaluator
        self.best = BestCheckpoint(self.average.parameters)
        self._names = distilled_layers(student, settings)
        used = [name for name in ("kl", "feature", "task") if getattr(settings.weights, name) > 0]
        self._term_names = [*used, "loss"]

    def _rate(self, step: int) -> float:
        """Share of the peak rate at a step: linear warm-up, then cosine to zero."""
        return rate_at(step, self.settings.epochs * self.steps, self.settings.warmup)

    def _variances(self, features: Mapping[str, Tensor], images: int) -> Tensor | None:
        """Variance of each layer's features over the whole batch, where this is not all of it."""
        if self.world.size == 1 or self.settings.feature_form == "absolute" or not self._names:
            return None
        return batch_variances(
            self.world, features, images, layers=len(self._names), device=self.student.device
        )

    def _batch(self, indices: list[int], generator: Generator) -> tuple[Tensor, Targets]:
        device = self.student.device
        images = self.images[indices].to(device, non_blocking=True).float() / 255
        targets = self.data.targets(indices).to(device)
        settings = self.settings
        # Drawn even where it cannot happen, so that a setting does not shift all other draws.
        four = bool(torch.rand(1, generator=generator) < settings.mosaic)
        if four and len(images) > 1:
            images, targets = mosaic(images, targets, generator)
        if settings.colour > 0:
            images = jitter_colours(images, settings.colour, generator)
        images, targets = augment(
            images, targets, generator, flip=settings.flip, zoom=settings.zoom
        )
        # Last: a camera sees the scene as it is by then.
        return camera(images, settings.camera, generator), targets

    def divergence(self) -> float:
        """Mean prediction divergence from the teacher over the whole set, nothing augmented."""
        batches = self.images.split(self.batch_size)[self.world.rank :: self.world.size]
        total = total_divergence(self.student, self.teacher, batches)
        return float(self.world.all_reduce_sum(total)) / len(self.data)

    def _state(self, epoch: int, history: list[dict[str, float]], start: float) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "history": history,
            "start": start,
            "student": self.student.module.state_dict(),
            "shadow": self.average.shadow,
            "best": self.best.state(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _save(self, state: dict[str, Any]) -> None:
        if not self.world.is_main_process:
            return
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.checkpoint, buffer.getvalue())

    def _resume(self) -> tuple[int, list[dict[str, float]], float | None]:
        if not self.world.broadcast(self.checkpoint.is_file()):
            return 0, [], None
        with self.world.main_process_first():
            return self._restore()

    def _restore(self) -> tuple[int, list[dict[str, float]], float | None]:
        try:
            state = torch.load(self.checkpoint, map_location=self.student.device, weights_only=True)
            self.student.module.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            for average, saved in zip(self.average.shadow, state["shadow"], strict=True):
                average.copy_(saved)
            # Checkpoints of earlier versions have none.
            self.best.restore(state.get("best"))
            return state["epoch"], state["history"], state["start"]
        except Exception as error:
            raise UserError(
                f"{self.checkpoint}: cannot be read ({type(error).__name__}); delete it to start "
                f"the training over"
            ) from None

    @torch.no_grad()
    def _agree(self) -> None:
        """Take the leading process's parameters: those found by another kind of processor may
        differ in their last bits, and would do so for good."""
        if self.world.size == 1:
            return
        tensors = [*self.average.parameters, *self.average.shadow, *self.frozen.levels()]
        for tensor in tensors:
            same = tensor.detach().contiguous()
            tensor.copy_(
                self.world.all_reduce_sum(
                    same if self.world.is_main_process else torch.zeros_like(same)
                )
            )

    def train(self, report: Report | None = None, within: Within | None = None) -> Outcome:
        """Run what is left of the epochs, choose the weights, and leave them in the student.

        Raises:
            UserError: where the loss or a weight stops being finite; the last checkpoint is kept.
        """
        settings = self.settings
        first, history, start = self._resume()
        self._agree()
        if start is None:
            start = self.divergence()
            self._save(self._state(0, history, start))
        ours, theirs = self.feature_hooks()
        saved_at = time.monotonic()
        try:
            for epoch in range(first, settings.epochs):
                history.append(self._epoch(epoch, ours, theirs, within))
                done = epoch + 1
                if self.evaluator is not None:
                    history[-1]["score"] = self._ask(self.evaluator, done)
                    # Evaluation has run through the feature_hooks as well.
                    ours.take()
                late = time.monotonic() - saved_at >= settings.checkpoint_minutes * 60
                if late or done == settings.epochs:
                    self._save(self._state(done, history, start))
                    saved_at = time.monotonic()
                if report is not None:
                    report(done, settings.epochs, history[-1])
        finally:
            ours.close()
            theirs.close()
        outcome = self._choose(start, history)
        self.frozen.unfreeze()
        return outcome

    def _epoch(
        self, epoch: int, ours: FeatureHooks, theirs: FeatureHooks, within: Within | None
    ) -> dict[str, float]:
        # Seeded by the epoch alone: a resumed run draws what an unbroken one would have.
        generator = Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.data), generator=generator).tolist()
        sums = torch.zeros(len(self._term_names), device=self.student.device)
        for number in range(self.steps):
            indices = order[number * self.batch_size : (number + 1) * self.batch_size]
            step = epoch * self.steps + number
            if within is not None:
                within(epoch, number / self.steps)
            sums += self.step(step, indices, generator, ours, theirs)
        means = dict(zip(self._term_names, (sums / self.steps).tolist(), strict=True))
        # What the last step broke is not in a loss yet, but would be in the checkpoint.
        with torch.no_grad():
            norms = torch.stack(torch._foreach_norm(self.average.parameters))
        shown = {**means, "largest weight norm": float(norms.max())}
        if not all(math.isfinite(value) for value in shown.values()):
            values = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            raise DivergedError(
                f"training diverged in epoch {epoch + 1} ({values}); the last good checkpoint is "
                f"{self.checkpoint}; lower distillation.lr, or use method: auto"
            )
        return means

    def step(
        self,
        step: int,
        indices: list[int],
        generator: Generator,
        ours: FeatureHooks,
        theirs: FeatureHooks,
    ) -> Tensor:
        """One step of the optimizer, and of all that goes with it.

        Args:
            step: its number, from 0, over all epochs.
            indices: images of the batch, all processes' parts of it.
            generator: on the CPU; draws the augmentation.
            ours, theirs: feature_hooks on the distilled layers of student and teacher.

        Returns:
            The weighted terms of the loss and their sum, `(terms + 1,)`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate(step)
        values = self._gradient(indices, generator, ours, theirs)
        nn.utils.clip_grad_norm_(
            self.average.parameters, self.settings.clip, error_if_nonfinite=False
        )
        self.optimizer.step()
        keep_zero_points_on_grids(self.zero_points)
        self.average.update(step)
        return values

    def feature_hooks(self) -> tuple[FeatureHooks, FeatureHooks]:
        """Taps on the distilled layers of student and teacher, to be closed by the caller."""
        student, teacher = self.student.module, self.teacher.module
        return FeatureHooks(student, self._names), FeatureHooks(teacher, self._names)

    def _gradient(
        self, indices: list[int], generator: Generator, ours: FeatureHooks, theirs: FeatureHooks
    ) -> Tensor:
        """Leave the gradient of the loss on the images `indices` in the parameters.

        Returns:
            The terms of the loss and the loss itself, `(terms + 1,)`.
        """
        # All of the batch, whatever the share: the draws, and what mosaics are made of, are its.
        images, targets = self._batch(indices, generator)
        mine = self.world.shard(len(indices))
        share = (mine.stop - mine.start) / len(indices)
        self.optimizer.zero_grad(set_to_none=True)
        if self.world.size > 1:
            images, targets = images[mine], targets.rows(mine.start, mine.stop)
        if share > 0:
            weighted = training_terms(
                self.student,
                self.teacher,
                images,
                targets,
                self.settings,
                ours,
                theirs,
                lambda features: self._variances(features, len(images)),
                self.precision,
            )
            terms = list(weighted.values())
            loss = torch.stack(terms).sum()
            # Means over the part, weighted so that they add up to the mean over the batch.
            (loss * share).backward()
            values = torch.stack([*terms, loss]).detach() * share
        else:
            self._variances({}, 0)
            values = torch.zeros(len(self._term_names), device=self.student.device)
        if self.world.size == 1:
            return values
        return add_up_gradients(self.world, self.average.parameters, values)

    def _ask(self, evaluator: Callable[[Any], float], done: int) -> float:
        """The evaluator's score of the weights after an epoch: of averaged ones, if any."""
        averaged = self.settings.ema > 0 and self.settings.selection != "last"
        if averaged:
            self.average.swap()
        score: float = self.world.broadcast(
            evaluator(self.student) if self.world.is_main_process else None
        )
        self.best.offer(done, score)
        if averaged:
            self.average.swap()
        return score

    def _choose(self, start: float, history: list[dict[str, float]]) -> Outcome:
        """Pick the weights: without any real image, unless a evaluator has looked at some."""
        divergence = {"start": start, "last": self.divergence()}
        if self.best.put_back():
            divergence["best"] = self.divergence()
            return Outcome("best", divergence, history, (self.best.epoch, self.best.score))
        if self.settings.ema == 0:
            return Outcome("last", divergence, history)
        self.average.swap()
        divergence["ema"] = self.divergence()
        selected = self.settings.selection
        if selected == "agreement":
            selected = min(("ema", "last"), key=lambda name: divergence[name])
        if selected == "last":
            self.average.swap()
        return Outcome(selected, divergence, history)

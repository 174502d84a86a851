"""The QAT loop: a low-bit student follows its float teacher on the calibration set."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from ..dataset.calibration import write_atomic
from ..detectors.base import Detector, Targets
from ..errors import DivergedError, UserError
from ..quantization.convert import quantized_layers
from ..quantization.quantizers import Quantizer
from ..recipe import Distillation
from .augment import augment, jitter_colours, mosaic
from .losses import FeatureTaps, distillation_terms, feature_distance

Report = Callable[[int, int, dict[str, float]], None]
"""Called after each epoch with epochs done, epochs in all, and the epoch's mean loss terms."""


class LabelledImages(Protocol):
    """What the trainer needs of a set: images all of one size, and their labels."""

    def __len__(self) -> int: ...

    def load(self, indices: list[int]) -> Tensor:
        """uint8 `(n, 3, h, w)`."""

    def targets(self, indices: list[int]) -> Targets: ...


@dataclass(frozen=True)
class Outcome:
    """How the training ended.

    Attributes:
        selected: "ema" or "last": which weights the student now has.
        agreement: divergence from the teacher on the set (lower is closer) at the calibrated start
            and of each candidate; no real image is looked at.
        history: mean loss terms by epoch.
    """

    selected: str
    agreement: dict[str, float]
    history: list[dict[str, float]]


def _parameter_groups(student: nn.Module, settings: Distillation) -> list[dict[str, Any]]:
    """Weights at `lr`; step sizes and zero points, which live on scales of their own, apart."""
    scales: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    owned = {
        id(p): p for m in student.modules() if isinstance(m, Quantizer) for p in m.parameters()
    }
    for parameter in student.parameters():
        if parameter.requires_grad:
            (scales if id(parameter) in owned else others).append(parameter)
    return [
        {"params": others, "lr": settings.lr, "peak": settings.lr},
        {"params": scales, "lr": settings.scale_lr, "peak": settings.scale_lr},
    ]


class _Leash:
    """Keeps each quantized weight within so many of its quantization steps of the float weight.

    A set of a few hundred synthetic images cannot say how the weights of a good network should
    move, only how they should be rounded: half a step is enough to choose between the two nearest
    levels (the space AdaRound searches), and what is bounded in steps tightens with the bit width
    by itself. Without a bound, training fits the set and drifts from what real images need.

    Args:
        module: the calibrated student, its weights still the float ones.
        steps: the bound, in steps of the calibrated grid; 0 for none.
    """

    def __init__(self, module: nn.Module, steps: float) -> None:
        self.weights: list[nn.Parameter] = []
        self.low: list[Tensor] = []
        self.high: list[Tensor] = []
        if steps == 0:
            return
        for _, layer in quantized_layers(module):
            weight = layer.weight.detach()
            scale = layer.weight_quantizer.scale.detach()
            reach = steps * scale.view(-1, *([1] * (weight.ndim - 1)))
            self.weights.append(layer.weight)
            self.low.append(weight - reach)
            self.high.append(weight + reach)

    @torch.no_grad()
    def pull(self) -> None:
        """Put what went too far back on the bound."""
        for weight, low, high in zip(self.weights, self.low, self.high, strict=True):
            torch.clamp(weight, low, high, out=weight)

    def state(self) -> list[Tensor]:
        """The bounds, for a checkpoint."""
        return [*self.low, *self.high]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Take the bounds from a checkpoint: the student it came with is no longer float."""
        for bound, saved in zip(self.state(), state, strict=True):
            bound.copy_(saved)


class _Average:
    """Exponential moving average of parameters, with the decay ramped up over the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.shadow = [p.detach().clone() for p in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages with the module's own values."""
        for parameter, average in zip(self.parameters, self.shadow, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


class Trainer:
    """Trains a quantized student, resumable at every checkpoint to the same result.

    Args:
        student: quantizers inserted and calibrated.
        teacher: the float detector, frozen.
        data: the calibration set.
        settings: the `distillation` section of a recipe.
        seed: fixes order and augmentation.
        folder: where `checkpoint.pt` lives while training runs.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        data: LabelledImages,
        settings: Distillation,
        *,
        seed: int,
        folder: Path,
    ) -> None:
        self.student, self.teacher, self.data = student, teacher, data
        # Convolutions on a CPU and tensor cores both want the channels last.
        for detector in (student, teacher):
            detector.module.to(memory_format=torch.channels_last)
        self.settings, self.seed = settings, seed
        self.checkpoint = folder / "checkpoint.pt"
        self.batch_size = min(settings.batch_size, len(data))
        # The last, smaller batch of an epoch is trained on too: no image is left out.
        self.steps = math.ceil(len(data) / self.batch_size)
        # Few enough to keep in memory as bytes: 2,000 images of 640 px are 2.3 GiB.
        self.images = data.load(list(range(len(data))))
        for parameter in student.module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for module in student.module.modules():
            if isinstance(module, Quantizer):
                module.zero_point.requires_grad_(module.asymmetric)
        self.optimizer = torch.optim.Adam(
            _parameter_groups(student.module, settings), fused=True, betas=(0.9, 0.999)
        )
        self.average = _Average(student.module, settings.ema)
        self.leash = _Leash(student.module, settings.drift)
        names = student.feature_layers() if settings.weights.feature > 0 else []
        self._names = names

    def _rate(self, step: int) -> float:
        """Share of the peak rate at a step: linear warm-up, then cosine to zero."""
        total = self.settings.epochs * self.steps
        warmup = round(self.settings.warmup * total)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def _terms(
        self, images: Tensor, targets: Targets, ours: FeatureTaps, theirs: FeatureTaps
    ) -> dict[str, Tensor]:
        weights, settings = self.settings.weights, self.settings
        with torch.no_grad():
            teacher_raw = self.teacher.raw(images)
        student_raw = self.student.raw(images)
        terms = {}
        if weights.kl > 0:
            terms["kl"] = weights.kl * distillation_terms(
                self.student,
                student_raw,
                teacher_raw,
                batch=len(images),
                form=settings.kl_form,
                temperature=settings.temperature,
            )
        if weights.feature > 0:
            terms["feature"] = weights.feature * feature_distance(ours.take(), theirs.take())
        if weights.task > 0:
            shape = (images.shape[2], images.shape[3])
            task = self.student.task_loss(student_raw, targets, shape)
            terms["task"] = weights.task * torch.stack(list(task.values())).sum()
        return terms

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
        return augment(images, targets, generator, flip=settings.flip, zoom=settings.zoom)

    @torch.no_grad()
    def divergence(self) -> float:
        """Mean prediction divergence from the teacher over the whole set, nothing augmented."""
        total = torch.zeros((), device=self.student.device)
        for start in range(0, len(self.data), self.batch_size):
            images = self.images[start : start + self.batch_size].to(self.student.device)
            images = images.float() / 255
            total += len(images) * distillation_terms(
                self.student,
                self.student.raw(images),
                self.teacher.raw(images),
                batch=len(images),
                form="family",
                temperature=1.0,
            )
        return float(total) / len(self.data)

    def _state(self, epoch: int, history: list[dict[str, float]], start: float) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "history": history,
            "start": start,
            "student": self.student.module.state_dict(),
            "shadow": self.average.shadow,
            "leash": self.leash.state(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _save(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.checkpoint, buffer.getvalue())

    def _resume(self) -> tuple[int, list[dict[str, float]], float | None]:
        if not self.checkpoint.is_file():
            return 0, [], None
        try:
            state = torch.load(self.checkpoint, map_location=self.student.device, weights_only=True)
            self.student.module.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            for average, saved in zip(self.average.shadow, state["shadow"], strict=True):
                average.copy_(saved)
            self.leash.restore(state["leash"])
            return state["epoch"], state["history"], state["start"]
        except Exception as error:
            raise UserError(
                f"{self.checkpoint}: cannot be read ({type(error).__name__}); delete it to start "
                f"the training over"
            ) from None

    def train(self, report: Report | None = None) -> Outcome:
        """Run what is left of the epochs, choose the weights, and leave them in the student.

        Raises:
            UserError: where the loss or a weight stops being finite; the last checkpoint is kept.
        """
        settings = self.settings
        first, history, start = self._resume()
        if start is None:
            start = self.divergence()
            self._save(self._state(0, history, start))
        ours = FeatureTaps(self.student.module, self._names)
        theirs = FeatureTaps(self.teacher.module, self._names)
        saved_at = time.monotonic()
        try:
            for epoch in range(first, settings.epochs):
                history.append(self._epoch(epoch, ours, theirs))
                done = epoch + 1
                late = time.monotonic() - saved_at >= settings.checkpoint_minutes * 60
                if late or done == settings.epochs:
                    self._save(self._state(done, history, start))
                    saved_at = time.monotonic()
                if report is not None:
                    report(done, settings.epochs, history[-1])
        finally:
            ours.close()
            theirs.close()
        return self._choose(start, history)

    def _epoch(self, epoch: int, ours: FeatureTaps, theirs: FeatureTaps) -> dict[str, float]:
        # Seeded by the epoch alone: a resumed run draws what an unbroken one would have.
        generator = Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.data), generator=generator).tolist()
        sums: dict[str, Tensor] = {}
        for number in range(self.steps):
            step = epoch * self.steps + number
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * self._rate(step)
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            images, targets = self._batch(chosen, generator)
            terms = self._terms(images, targets, ours, theirs)
            loss = torch.stack(list(terms.values())).sum()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(
                self.average.parameters, self.settings.clip, error_if_nonfinite=False
            )
            self.optimizer.step()
            self.leash.pull()
            self.average.update(step)
            for name, term in {**terms, "loss": loss}.items():
                sums[name] = sums.get(name, torch.zeros_like(term)) + term.detach()
        means = {name: float(total) / self.steps for name, total in sums.items()}
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

    def _choose(self, start: float, history: list[dict[str, float]]) -> Outcome:
        """Pick last or averaged weights without any real image."""
        agreement = {"start": start, "last": self.divergence()}
        if self.settings.ema == 0:
            return Outcome("last", agreement, history)
        self.average.swap()
        agreement["ema"] = self.divergence()
        selected = self.settings.selection
        if selected == "agreement":
            selected = min(("ema", "last"), key=lambda name: agreement[name])
        if selected == "last":
            self.average.swap()
        return Outcome(selected, agreement, history)

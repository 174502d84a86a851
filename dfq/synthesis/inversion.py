"""The optimisation loop: noise in, images that a frozen detector takes for training data out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ..errors import UserError
from ..graph.fold_batchnorm import fold
from ..models.base import Detections, Detector, Targets
from ..runtime.precision import computing_in, float32, resolve_precision
from .adaptive_labels import AdaptiveSampler
from .augmentation import random_erasing, resized, shown
from .labels import label_start, teacher_scores
from .loss_weighting import COMBINATIONS
from .losses.batchnorm import BatchNormStatistics, has_statistics
from .losses.patch_entropy import PatchSimilarity
from .multiscale import MultiscaleAdam
from .settings import Synthesis
from .start import Start, matched_start
from .techniques import Techniques

EARLY, EARLY_WEIGHT = 4, 2.0
"""So many layers after the first count so many times more than later ones: they see most of what
later ones lack, and images gain contrast there that the first layer does not ask for."""

Report = Callable[[str, int, int, dict[str, float]], None]
"""Called now and then with stage, iteration, iterations of the stage, and loss terms."""


LAST_STAGE = "full"
"""Of the images at their full size."""


@dataclass(frozen=True)
class Batch:
    """A finished batch: uint8 `(n, 3, s, s)` RGB, labels `(n_i, 5)` and the teacher's scores."""

    images: Tensor
    labels: list[Tensor]
    scores: list[Tensor]


@dataclass(frozen=True)
class Stage:
    """A part of what a batch goes through: iterations on images of `side` pixels."""

    name: str
    iterations: int
    side: int


def generator_for(seed: int, shard: int, stage: str) -> Generator:
    """A generator that depends on these three alone, so any process can make any shard."""
    stages = {"labels": 1, "images": 2, "augment": 3}
    mixed = (seed * 1_000_003 + shard) * 8 + stages[stage]
    return Generator().manual_seed(mixed)


class Inversion:
    """Optimises batches of images for one frozen detector.

    Args:
        detector: the teacher, eval mode, parameters frozen, BatchNorm unfused; left as it is.
        settings: the `synthesis` section of a recipe.

    Raises:
        UserError: where the network has no BatchNorm and a BatchNorm term is asked for, or the set
            that labels are to be taken from cannot be used.
    """

    def __init__(self, detector: Detector, settings: Synthesis) -> None:
        # Folded and channels-last, the same function runs about a third faster on a CPU.
        self.detector = fold(detector.clone())
        self.detector.mask_targets = settings.masks
        self.detector.module.to(memory_format=torch.channels_last)
        self.settings = settings
        self.uses_bn = settings.weights.bn > 0 or settings.weights.first_bn > 0
        attention = self.detector.attention_layers() if settings.weights.entropy > 0 else []
        self.similarity = PatchSimilarity(self.detector.module, attention) if attention else None
        self.statistics = None
        # A transformer need not have BatchNorm, which is a mistake to ask for in other networks.
        if self.uses_bn and not (attention and not has_statistics(self.detector.module)):
            self.statistics = BatchNormStatistics(self.detector.module, self._glance)
        self.precision = resolve_precision(settings.precision, detector.device, "synthesis")
        # The first convolution would take no more bits; a zoom would.
        exact = settings.techniques.zoom > 0 or not detector.half_images
        half = self.precision == "bfloat16" and not exact
        self.seen_in = torch.bfloat16 if half else torch.float32
        self.image_size = settings.image_size or detector.image_size
        self.start_labels = label_start(settings, detector.names)
        self.techniques = Techniques(
            settings.techniques,
            self.detector,
            self.statistics,
            form=settings.bn_form,
        )
        self.start = Start(settings.init)
        matched = settings.bn_form == "gaussian" and settings.iterations > 0
        if self.statistics is not None and matched:
            # A multiple of every stride, on which a border counts little.
            side = 4 * self.detector.stride
            self.start = matched_start(self.statistics, self._look, side, settings.init)

    def _look(self, images: Tensor) -> None:
        self.detector.raw(images.to(self.detector.device))

    def _glance(self) -> None:
        """One forward pass on a small image."""
        side = self.detector.stride * 2
        self._look(torch.zeros(1, 3, side, side))

    @contextlib.contextmanager
    def _watching(self, generator: Generator) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.techniques.watching(generator))
            for watcher in (self.statistics, self.similarity):
                if watcher is not None:
                    stack.enter_context(watcher)
            yield

    def _run(self, images: Tensor, targets: Targets) -> Tensor | None:
        """One forward pass, and the task's loss on it, where it counts."""
        # Convolutions alone take fewer bits; statistics and losses are summed in float32.
        with computing_in(self.precision, images.device):
            raw = self.detector.raw(images)
        if self.settings.weights.task == 0 or self.settings.labels == "none":
            return None
        size = images.shape[2]
        given = raw if self.detector.half_loss else float32(raw)
        return torch.stack(
            list(self.detector.task_loss(given, targets, (size, size)).values())
        ).sum()

    def _losses(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The terms that come from the network, scalars: "bn", "first_bn", "entropy" and
        "task"."""
        # First, as a network may run layers for the labels that it does not run for the images.
        task = self._run(images, targets)
        terms: dict[str, Tensor] = {}
        if self.statistics is not None:
            terms |= self._bn_terms(self.statistics)
        if self.similarity is not None:
            summed = self.settings.balance == "loss"
            terms["entropy"] = -self.similarity.entropy(summed=summed)
        if task is not None:
            terms["task"] = task
        return terms

    def _bn_terms(self, statistics: BatchNormStatistics) -> dict[str, Tensor]:
        form, weights = self.settings.bn_form, self.settings.weights
        if form == "gaussian":
            divergences = self.techniques.distances(statistics.divergences())
            counts = torch.ones_like(divergences) if weights.bn > 0 else divergences * 0
            counts[1 : 1 + EARLY] *= EARLY_WEIGHT
            counts[0] += weights.first_bn
            # The worst layers count most, so that none is given up for the many.
            return {"bn": torch.linalg.vector_norm(counts.detach() * divergences)}
        distances = self.techniques.distances(statistics.distances(relative=form == "relative"))
        return {"bn": distances.sum(), "first_bn": distances[0]}

    def _parts(self, view: Tensor, targets: Targets) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """See `balance.Parts`: the micro-batches of a batch, or the batch itself.

        The statistics are those of the whole batch: a first pass without a graph gathers them, and
        the second one's gradient is exactly theirs. The task's loss is the mean of the parts',
        weighted by their images. That is the batch's where a family divides by images or places;
        one that divides by matched predictions (YOLOv5's box and class terms) or assigned scores
        (Ultralytics) divides by those of a part, so images with few of them count a little more.
        """
        count = len(view)
        size = self.settings.micro_batch or count
        if size >= count:
            leaf = view.detach().requires_grad_()
            yield self._losses(leaf, targets), leaf
            return
        starts = range(0, count, size)
        pieces = [(view[i : i + size].detach(), targets.rows(i, i + size)) for i in starts]
        if self.statistics is not None:
            # Nothing asks for a gradient, so no graph is made; without them recorded, a two-stage
            # network would run other layers than in the second pass.
            for piece, labels in pieces:
                self._run(piece, labels)
                self.statistics.gather()
        for piece, labels in pieces:
            terms = self._losses(piece.requires_grad_(), labels)
            for name in terms.keys() & {"task", "entropy"}:
                terms[name] = terms[name] * (len(piece) / count)
            yield terms, piece
            del terms
        if self.statistics is not None:
            self.statistics.release()

    def detect(self, images: Tensor, **thresholds: Any) -> list[Detections]:
        """What the teacher finds in images `(n, 3, h, w)` in [0, 1], by image; as many go through
        the network at once as in the optimisation.

        Args:
            images: RGB.
            thresholds: of `Detector.decode`.
        """
        found = []
        for part in images.split(self.settings.micro_batch or len(images)):
            found += self.detector.detect(part, **thresholds)
            if self.statistics is not None:
                self.statistics.forget()
        return found

    def optimise(
        self,
        images: Tensor,
        labels: Sequence[Tensor],
        iterations: int,
        learning_rate: float,
        generator: Generator,
        *,
        stage: str,
        after: Callable[[int, Tensor], list[Tensor] | None] | None = None,
        report: Report | None = None,
    ) -> Tensor:
        """Adam with cosine decay on several scales, pixels clamped to [0, 1] after each step.

        Args:
            images: the start `(n, 3, s, s)` in [0, 1].
            labels: per image, fixed unless `after` returns new ones.
            iterations, learning_rate: of this call; the rate falls to zero over it.
            generator: draws flips, erased rectangles and what the techniques leave to chance.
            stage: its name, for `report`; `LAST_STAGE` ends with settling, see
                `Synthesis.settle`.
            after: called after each iteration with its number and the images.

        Raises:
            UserError: where the loss stops being finite.
        """
        device = self.detector.device
        # In planes, in which neighbours and mirror images are quickest to find.
        pixels = images.to(device).clone(memory_format=torch.contiguous_format).requires_grad_()
        optimizer = MultiscaleAdam(pixels, self.settings.scales)
        targets = Targets.from_per_image(labels).to(device)
        count, size = images.shape[0], images.shape[2]
        settings = self.settings
        combine = COMBINATIONS[settings.balance](settings.weights)
        every = max(1, iterations // 20)
        peak = learning_rate * self.start.pace
        settles = stage == LAST_STAGE and self.statistics is not None
        begin = iterations - round(settings.settle * iterations) if settles else iterations
        with self._watching(generator):
            for step in range(iterations):
                rate = peak * 0.5 * (1 + math.cos(math.pi * step / iterations))
                if step == begin:
                    combine.settle()
                flipped, erased, seen = None, None, targets
                if settings.flip > 0:
                    flipped = torch.rand(count, generator=generator) < settings.flip
                    flipped = flipped.to(device, non_blocking=True)
                    seen = targets.flip_horizontal(flipped)
                if settings.erase > 0 and step < begin:
                    erased = random_erasing(count, size, settings.erase, generator)
                    erased = erased.to(device, non_blocking=True)
                view = shown(pixels, flipped, erased, self.seen_in)
                view, seen = self.techniques.view(view, seen, generator)
                gradient, terms = combine(self._parts(view, seen), step)
                (gradient,) = torch.autograd.grad(view, pixels, gradient)
                gradient, terms["tv"] = combine.smoothed(gradient, pixels)
                if settings.weights.l2 > 0:
                    gradient, terms["l2"] = combine.darkened(gradient, pixels)
                gradient = self.techniques.gradient(gradient)
                optimizer.step(gradient, rate)
                # The second one as well: from it on, it is known how long one takes.
                if step % every == 0 or step in (1, iterations - 1):
                    values = {name: float(term) for name, term in terms.items()}
                    if not math.isfinite(sum(values.values())):
                        raise UserError(
                            f"synthesis: the loss is not finite at iteration {step} of stage "
                            f"'{stage}' ({values}); lower synthesis.learning_rate"
                        )
                    if report is not None:
                        report(stage, step + 1, iterations, values)
                if after is not None:
                    changed = after(step, pixels.detach())
                    if changed is not None:
                        targets = Targets.from_per_image(changed).to(device)
        return pixels.detach()

    def label_stage(
        self, count: int, generator: Generator, augment: Generator, report: Report | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Labels for `count` images; for adaptive ones by optimising at low resolution and letting
        the detector correct them along the way.

        Returns:
            The labels, and the images of this stage, None where there was none.
        """
        settings, stage = self.settings, self.settings.label_stage
        labels = self.start_labels(generator, count, self.detector.num_classes)
        if settings.labels != "adaptive":
            return labels, None
        noise = self.start.noise(count, stage.image_size, generator)
        sampler = AdaptiveSampler(self.detect, stage, labels, generator)
        images = self.optimise(
            noise,
            labels,
            stage.iterations,
            settings.learning_rate,
            augment,
            stage="labels",
            after=sampler,
            report=report,
        )
        return sampler.labels, images

    def image_stage(
        self,
        labels: Sequence[Tensor],
        generator: Generator,
        augment: Generator,
        report: Report | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Images `(n, 3, s, s)` in [0, 1] for fixed labels, at full size or, with `multires`, at
        half the size first.

        Args:
            labels: per image.
            generator: draws the noise that the images start from.
            augment: draws what changes from one iteration to the next.
            report: progress.
            start: images `(n, 3, k, k)` in [0, 1] to start from instead, of any size.
        """
        settings = self.settings
        size, rate = self.image_size, settings.learning_rate
        coarse, small = self._half()

        def begin(side: int) -> Tensor:
            if start is None:
                return self.start.noise(len(labels), side, generator)
            return resized(start, side)

        if coarse == 0:
            images = begin(size)
        else:
            images = self.optimise(
                begin(small), labels, coarse, rate, augment, stage="small", report=report
            )
            images = resized(images, size)
            rate = rate / 2
        if settings.iterations - coarse == 0:
            return images
        return self.optimise(
            images,
            labels,
            settings.iterations - coarse,
            rate,
            augment,
            stage=LAST_STAGE,
            report=report,
        )

    def _half(self) -> tuple[int, int]:
        """How many iterations of the image stage are at half the size, and what side that is."""
        coarse = round(self.settings.multires * self.settings.iterations)
        # To the next multiple of the stride.
        stride = self.detector.stride
        small = max(stride, -(-self.image_size // (2 * stride)) * stride)
        return (0 if small == self.image_size else coarse), small

    def stages(self) -> list[Stage]:
        """What a batch goes through, in order."""
        settings, (coarse, small) = self.settings, self._half()
        label = settings.label_stage
        of_labels = label.iterations if settings.labels == "adaptive" else 0
        stages = [
            Stage("labels", of_labels, label.image_size),
            Stage("small", coarse, small),
            Stage(LAST_STAGE, settings.iterations - coarse, self.image_size),
        ]
        return [stage for stage in stages if stage.iterations > 0]

    def batch(self, count: int, seed: int, shard: int, report: Report | None = None) -> Batch:
        """Make shard `shard` of `count` images: both stages, 8-bit images, the teacher's scores."""
        augment = generator_for(seed, shard, "augment")
        chosen = generator_for(seed, shard, "labels")
        labels, early = self.label_stage(count, chosen, augment, report)
        start = early if self.settings.label_stage.reuse else None
        noise = generator_for(seed, shard, "images")
        images = self.image_stage(labels, noise, augment, report, start)
        stored = (images * 255).round_().clamp_(0, 255).to(torch.uint8)
        found = self.detect(stored.float() / 255, score_threshold=0.01, iou_threshold=0.6)
        scores = teacher_scores(labels, found, self.image_size)
        return Batch(stored.cpu(), list(labels), scores)

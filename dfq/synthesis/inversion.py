"""The optimisation loop: noise in, images that a frozen detector takes for training data out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from ..graph.fold_batchnorm import fold
from ..models import require_detector
from ..models.base import Detections, Model, Targets
from ..models.classifying import Classifier
from ..runtime.precision import computing_in, float32, resolve_precision
from .adaptive_labels import AdaptiveSampler
from .augmentation import resized
from .half_weights import cast_once
from .iteration import own_stream
from .labels import applied, label_start, teacher_scores
from .loop import LAST_STAGE, Loop, Report
from .losses.batchnorm import BatchNormStatistics, has_statistics
from .losses.patch_entropy import PatchSimilarity
from .settings import Synthesis
from .side_by_side import Batch, Stage, generator_for, joined, several, split
from .start import Start, matched_start
from .swing import swinging

EARLY, EARLY_WEIGHT = 4, 2.0
"""So many layers after the first count so many times more: they see what later ones lack."""


class Inversion:
    """Optimises batches of images for one frozen detector.

    Args:
        detector: the teacher, eval mode, parameters frozen, BatchNorm unfused; left as it is.
        settings: the `synthesis` section of a recipe.

    Raises:
        UserError: where the network has no BatchNorm and a BatchNorm term is asked for, or the set
            that labels are to be taken from cannot be used.
    """

    def __init__(self, detector: Model, settings: Synthesis) -> None:
        # Folded and channels-last, the same function runs about a third faster on a CPU.
        self.detector = fold(detector.clone())
        self.detector.mask_targets = settings.masks
        self.detector.module.to(memory_format=torch.channels_last)
        settings = applied(detector, settings)
        self.settings = settings
        self.uses_bn = settings.weights.bn > 0 or settings.weights.first_bn > 0
        attention = self.detector.attention_layers() if settings.weights.entropy > 0 else []
        self.similarity = None
        if attention:
            skipped = self.detector.prefix_tokens
            self.similarity = PatchSimilarity(self.detector.module, attention, skipped)
        self.statistics = None
        # A transformer need not have BatchNorm, which is a mistake to ask for in other networks.
        if self.uses_bn and not (attention and not has_statistics(self.detector.module)):
            self.statistics = BatchNormStatistics(self.detector.module, self._glance)
        self.precision = resolve_precision(settings.precision, detector.device, "synthesis")
        # The first convolution would take no more bits.
        half = self.precision == "bfloat16" and detector.half_images
        self.seen_in = torch.bfloat16 if half else torch.float32
        self.image_size = settings.image_size or detector.image_size
        self.start_labels = label_start(settings, detector.names)
        self.shards = 1
        # What is of fixed shapes can be recorded, and waits for nothing.
        self.static = self.can_take_several and detector.device.type == "cuda"
        self.record, self.not_recorded = not settings.techniques.swing, ""
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

    @property
    def can_take_several(self) -> bool:
        """Whether several shards can be made side by side."""
        return (
            self.detector.static_loss
            and self.similarity is None
            and self.settings.micro_batch is None
        )

    def give_up_recording(self, why: str) -> None:
        """Iterations cannot be recorded on this device."""
        self.record, self.not_recorded = False, why

    @contextlib.contextmanager
    def _watching(self, *generators: Generator) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.precision == "bfloat16":
                stack.enter_context(cast_once(self.detector.module))
            if self.settings.techniques.swing:
                stack.enter_context(swinging(self.detector.module, generators))
            for watcher in (self.statistics, self.similarity):
                if watcher is not None:
                    stack.enter_context(watcher)
            stack.callback(self._side_by_side, self.shards)
            self._side_by_side(len(generators))
            yield

    def _side_by_side(self, shards: int) -> int:
        """So many shards go through the network from now on; how many did before."""
        before, self.shards = self.shards, shards
        if self.statistics is not None and self.statistics.groups != shards:
            self.statistics.groups = shards
        return before

    def _run(self, images: Tensor, targets: Targets) -> Tensor | None:
        """One forward pass, and the task's loss on it, where it counts."""
        # Convolutions alone take fewer bits; statistics and losses are summed in float32.
        with computing_in(self.precision, images.device):
            raw = self.detector.raw(images)
        if self.settings.weights.task == 0 or self.settings.labels == "none":
            return None
        size = images.shape[2], images.shape[2]
        raw = raw if self.detector.half_loss else float32(raw)
        if self.static:
            shard_losses = self.detector.shard_losses(raw, targets, size, self.shards)
            return shard_losses.squeeze(0) if self.shards == 1 else shard_losses
        if self.shards == 1:
            return torch.stack(list(self.detector.task_loss(raw, targets, size).values())).sum()
        count, losses = len(images) // self.shards, []
        for shard, part in enumerate(split(raw, self.shards)):
            labels = targets.rows(shard * count, (shard + 1) * count)
            losses.append(sum(self.detector.task_loss(part, labels, size).values()))
        return torch.stack(losses)

    def _losses(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The terms that come from the network: "bn", "first_bn", "entropy" and "task"; scalars, or
        `(shards,)` where there are several."""
        # First, as a network may run layers for the labels that it does not run for the images.
        task, terms = self._run(images, targets), dict[str, Tensor]()
        if self.statistics is not None:
            terms |= self._bn_terms(self.statistics)
        if self.similarity is not None:
            summed = self.settings.balance == "loss"
            terms["entropy"] = -self.similarity.entropy(summed=summed)
        if task is not None:
            terms["task"] = task
        return terms

    def _bn_terms(self, statistics: BatchNormStatistics) -> dict[str, Tensor]:
        form = self.settings.bn_form
        if form == "gaussian":
            return {"bn": statistics.divergence(self._weigh)}
        distances = statistics.distances(relative=form == "relative")
        return {"bn": distances.sum(-1), "first_bn": distances[..., 0]}

    def _weigh(self, layers: int) -> Tensor:
        """What each layer counts, in the order they run, `(layers,)`."""
        weights = self.settings.weights
        counts = torch.full((layers,), float(weights.bn > 0))
        counts[1 : 1 + EARLY] *= EARLY_WEIGHT
        counts[0] += weights.first_bn
        return counts

    def _parts(self, view: Tensor, targets: Targets) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """See `loss_weighting.Parts`: the micro-batches of a batch, or the batch itself.

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
        before = self._side_by_side(1)
        detections = []
        for part in images.split(self.settings.micro_batch or len(images)):
            detections += require_detector(self.detector).detect(part, **thresholds)
            if self.statistics is not None:
                self.statistics.forget()
        self._side_by_side(before)
        return detections

    def optimise(
        self,
        images: Tensor,
        labels: Sequence[Tensor],
        iterations: int,
        learning_rate: float,
        generator: Generator | Sequence[Generator],
        *,
        stage: str,
        after: Callable[[int, Tensor], list[Tensor] | None] | None = None,
        report: Report | Sequence[Report] | None = None,
    ) -> Tensor:
        """Adam with cosine decay on several scales, pixels clamped to [0, 1] after each step.

        Several shards are optimised side by side, each as it would be alone.

        Args:
            images: the start `(shards * n, 3, s, s)` in [0, 1], one shard after the other.
            labels: per image, fixed unless `after` returns new ones.
            iterations, learning_rate: of this call; the rate falls to zero over it.
            generator: draws flips, erased rectangles and how convolutions swing; one for each
                shard.
            stage: its name, for `report`; `LAST_STAGE` ends with settling, see
                `Synthesis.settle`.
            after: called after each iteration with its number and the images.
            report: one for each shard.

        Raises:
            UserError: where the loss stops being finite.
        """
        generators = several(generator)
        reports = None if report is None else several(report)
        with own_stream(self.detector.device), self._watching(*generators):
            loop = Loop(self, images, labels, iterations, learning_rate, generators, stage)
            return loop.run(after, reports)

    def label_stage(
        self,
        count: int,
        generator: Generator | Sequence[Generator],
        augment: Generator | Sequence[Generator],
        report: Report | Sequence[Report] | None = None,
    ) -> list[Tensor]:
        """Labels for the images of each shard: `(n_i, 5)` an image (category, cx, cy, w, h, in
        shares of the sides), one shard after the other. Adaptive ones are found by optimising
        images at low resolution while the detector corrects the labels.

        Args:
            count: images of a shard.
            generator: draws labels and noise; one for each shard.
            augment: draws views of the images; one for each shard.
            report: told of the losses; one for each shard.
        """
        settings, stage = self.settings, self.settings.label_stage
        generators = several(generator)
        labels = [self.start_labels(g, count, self.detector.num_classes) for g in generators]
        if settings.labels != "adaptive":
            return joined(labels)
        noise = [self.start.noise(count, stage.image_size, g) for g in generators]
        samplers = [
            AdaptiveSampler(self.detect, stage, shard_labels, g)
            for shard_labels, g in zip(labels, generators, strict=True)
        ]

        def after(step: int, images: Tensor) -> list[Tensor] | None:
            parts = zip(samplers, images.chunk(len(samplers)), strict=True)
            changed = [sampler(step, part) for sampler, part in parts]
            return None if changed[0] is None else joined([rows or [] for rows in changed])

        self.optimise(
            torch.cat(noise),
            joined(labels),
            stage.iterations,
            settings.learning_rate,
            augment,
            stage="labels",
            after=after,
            report=report,
        )
        return joined([sampler.labels for sampler in samplers])

    def image_stage(
        self,
        labels: Sequence[Tensor],
        generator: Generator | Sequence[Generator],
        augment: Generator | Sequence[Generator],
        report: Report | Sequence[Report] | None = None,
    ) -> Tensor:
        """Images `(shards * n, 3, s, s)` in [0, 1] for fixed labels, at full size or, with
        `multires`, at half the size first.

        Args:
            labels: per image, of one shard after the other.
            generator: draws the noise that the images start from; one for each shard.
            augment: draws what changes from one iteration to the next; one for each shard.
            report: progress; one for each shard.
        """
        settings, generators = self.settings, several(generator)
        size, rate = self.image_size, settings.learning_rate
        coarse, small = self._half()
        count = len(labels) // len(generators)

        def begin(side: int) -> Tensor:
            return torch.cat([self.start.noise(count, side, g) for g in generators])

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
        (batch,) = self.batches(count, seed, [shard], None if report is None else [report])
        return batch

    def batches(
        self, count: int, seed: int, shards: Sequence[int], reports: Sequence[Report] | None = None
    ) -> list[Batch]:
        """Make shards of `count` images each side by side, each with the same result as alone."""

        def generators(stage: str) -> list[Generator]:
            return [generator_for(seed, shard, stage) for shard in shards]

        augment = generators("augment")
        labels = self.label_stage(count, generators("labels"), augment, reports)
        images = self.image_stage(labels, generators("images"), augment, reports)
        made = []
        for index, part in enumerate(images.split(count)):
            rows = labels[index * count : (index + 1) * count]
            stored = (part * 255).round_().clamp_(0, 255).to(torch.uint8)
            made.append(Batch(stored.cpu(), list(rows), self._scores(stored.float() / 255, rows)))
        return made

    def _scores(self, images: Tensor, labels: Sequence[Tensor]) -> list[Tensor]:
        """How sure the teacher is of each label of one shard's images."""
        if not isinstance(self.detector, Classifier):
            detections = self.detect(images, score_threshold=0.01, iou_threshold=0.6)
            return teacher_scores(labels, detections, self.image_size)
        before, scores = self._side_by_side(1), []
        size = self.settings.micro_batch or len(images)
        for part in (slice(i, i + size) for i in range(0, len(images), size)):
            scores += self.detector.label_scores(images[part], labels[part])
            if self.statistics is not None:
                self.statistics.forget()
        self._side_by_side(before)
        return scores

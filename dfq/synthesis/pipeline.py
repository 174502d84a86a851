"""From a detector and settings to a calibration set on disk, shard by shard."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..data.calibration_set import CalibrationSet
from ..data.calibration_writer import CalibrationWriter
from ..data.preview import write_preview
from ..errors import UserError
from ..kernels.loader import why_none
from ..models.base import Model
from ..models.loading import RANDOM
from ..runtime.distributed import World, one_thread
from ..runtime.files import user_path
from ..runtime.precision import resolve_precision
from ..runtime.unfinished import short_name
from .inversion import Inversion
from .labels import CLASS, applied, label_source_identity
from .pace import Pace
from .quality import set_quality
from .settings import Synthesis, as_recorded
from .shards import Plan, ShardMaker, ShardReport, make_shards
from .together import shards_at_once
from .worker_pool import Workers, worker_count

# Raised when a change of the code changes the images: older sets are then not mistaken for new.
ALGORITHM = 8

PREVIEW = "preview.png"
"""A grid of the first images with their labels, beside `images/`."""

LOOKED_AT = 128
"""Images of a set, at most, that tell how well it meets the statistics."""

FOLDER_SECONDS = 30.0
"""How long the folder of the leading process may take to show on another node."""


def determinants(detector: Model, settings: Synthesis, seed: int) -> dict[str, Any]:
    """All that decides what is in a set, JSON-able; equal determinants mean an equal set."""
    settings = applied(detector, settings)
    values = as_recorded(settings)
    values["image_size"] = settings.image_size or detector.image_size
    values["precision"] = resolve_precision(settings.precision, detector.device, "synthesis")
    # What does not apply does not count.
    if not detector.attention_layers():
        del values["weights"]["entropy"]
    if not detector.has_masks:
        del values["masks"]
    if settings.labels == CLASS:
        del values["label_stage"]
    if settings.weights.l2 == 0:
        del values["weights"]["l2"]
    identity = label_source_identity(settings)
    if identity is not None:
        # What the labels are counts, not where they lie.
        values["labels"] = f"{settings.labels.partition(':')[0]}:{identity}"
    wanted = {
        "algorithm": ALGORITHM,
        "checkpoint": detector.fingerprint,
        "family": detector.family,
        "seed": seed,
        "synthesis": values,
    }
    if without_kernels(detector, settings):
        wanted["kernels"] = "pytorch"
    return wanted


def without_kernels(detector: Model, settings: Synthesis) -> bool:
    """Whether PyTorch computes what compiled functions could (see `kernels.loader`): its sums end
    in other last bits, and so do the images."""
    optimises = settings.iterations > 0 or settings.labels == "adaptive"
    return optimises and detector.device.type == "cpu" and why_none() is not None


def set_name(detector: Model, settings: Synthesis, seed: int) -> str:
    """A folder name made from what determines the set."""
    wanted = determinants(detector, settings, seed)
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    stem = short_name(Path(detector.source).stem) or detector.family
    size = wanted["synthesis"]["image_size"]
    return f"{stem}-{settings.images}x{size}-{digest[:12]}"


def located(source: str) -> str | None:
    """What names a model from wherever it is asked: absolute paths; None where that is no file."""
    network, apart, weights = source.rpartition("@")
    path = user_path(source)
    if path.is_file():
        return str(path.absolute())
    if apart and (file := user_path(weights)).is_file():
        return f"{located(network) or network}@{file.absolute()}"
    if apart and weights == RANDOM and (file := user_path(network)).is_file():
        return f"{file.absolute()}@{RANDOM}"
    return None


def check(detector: Model, settings: Synthesis) -> None:
    """Refuse what cannot work before any work starts.

    Raises:
        UserError: for an image size that is no multiple of the stride, or a loss without terms.
    """
    detector.check_size(settings.image_size or detector.image_size, "synthesis.image_size")
    adaptive = settings.labels == "adaptive"
    if adaptive:
        detector.check_size(settings.label_stage.image_size, "synthesis.label_stage.image_size")
    weights = settings.weights
    labelled = weights.task > 0 and settings.labels != "none"
    attends = weights.entropy > 0 and bool(detector.attention_layers())
    statistics = weights.bn > 0 or weights.first_bn > 0
    optimises = settings.iterations > 0 or adaptive
    regularised = weights.tv > 0 or weights.l2 > 0
    if optimises and not (statistics or regularised or labelled or attends):
        raise UserError(
            "synthesis.weights: every term that applies has weight 0, so there is nothing to "
            "optimise; set one above 0, or synthesis.iterations=0 with labels that are not adaptive"
        )


def synthesize_set(
    detector: Model,
    settings: Synthesis,
    seed: int,
    out: Path,
    *,
    report: ShardReport | None = None,
    shard_done: Callable[[int, int], None] | None = None,
    left: Callable[[float], None] | None = None,
    note: Callable[[str], None] | None = None,
    workers: int | None = None,
    at_once: int | None = None,
    world: World | None = None,
) -> CalibrationSet:
    """Make the calibration set of `detector` in folder `out`, or finish one that was interrupted.

    The result does not depend on how often it was interrupted, nor on how many processes made it:
    every shard draws from generators seeded by (seed, shard) alone and, on a CPU, is computed on
    one thread.

    Args:
        detector: frozen, unfused.
        settings: the `synthesis` section of a recipe.
        seed: fixes the set.
        out: the folder; a complete set of the same determinants is returned as it is. With several
            processes, one folder that all of them see.
        report: progress within a shard, of this process and its workers.
        shard_done: called with (images done, images in all), also once at the start; in the leading
            process only.
        left: called with the seconds that this process and its workers will still take, from the
            first iterations on.
        note: called with a line to be told, in the leading process only.
        workers: processes to start on this machine; None: as many as are worth it, see
            `worker_pool.worker_count`.
        at_once: shards to make side by side in each; None: as many as are worth it, see
            `together.shards_at_once`.
        world: the processes that were started together, each of which calls this; None: alone.

    Raises:
        UserError: for settings that cannot work, a folder that holds something else, or a process
            of the run that died.
        OSError: where the folder cannot be written.
    """
    settings = applied(detector, settings)
    check(detector, settings)
    world = world or World()
    plan = Plan(seed, settings.images, settings.batch_size)
    if world.size > 1 and workers is not None and workers > 1:
        raise UserError("workers: torchrun has started the processes already; leave --workers out")
    wanted = determinants(detector, settings, seed)
    with contextlib.ExitStack() as stack:
        threads = torch.get_num_threads()
        stack.enter_context(one_thread(detector.device))
        with world.main_process_first():
            # First of all, for it refuses networks and labels that it cannot work with.
            inversion = Inversion(detector, settings)
            if not world.is_main_process:
                _await_folder(out)
            writer = CalibrationWriter(out, wanted, detector.names, plan.shards)
            if world.is_main_process and not writer.complete:
                stack.enter_context(writer.lock())
            elif world.is_main_process:
                # Found, and not made just now: it may have been changed since.
                CalibrationSet.open(out).require_intact()
        missing = world.broadcast(writer.missing())
        progress = _Progress(writer, plan, missing, shard_done if world.is_main_process else None)
        if missing:
            if note is not None and world.is_main_process and without_kernels(detector, settings):
                note(f"synthesis: {why_none()}: PyTorch does without them, and takes longer")
            mine = missing[world.rank :: world.size]
            count = 1
            if world.size == 1:
                count = worker_count(workers, threads, inversion.detector, settings, plan, missing)
            tell = note if world.is_main_process else None
            together = shards_at_once(at_once, inversion, plan, mine, tell) if count == 1 else 1
            if count > 1 and at_once is not None:
                together = shards_at_once(at_once, inversion, plan, mine)
            pace = Pace(inversion.stages(), plan, mine, count * together)

            def told(shard: int, stage: str, step: int, *more: Any) -> None:
                if report is not None:
                    report(shard, stage, step, *more)
                pace.report(shard, stage, step)
                seconds = pace.left()
                if left is not None and seconds is not None:
                    left(seconds)

            def written(shard: int) -> None:
                pace.written(shard)
                progress()

            make = _maker(inversion, detector, settings, plan, writer, count, together)
            make(mine, told, written)
            world.barrier(progress)
            progress()
        with world.main_process_first():
            if not world.is_main_process:
                return CalibrationSet.open(out)
            versions = {"dfq": __version__, "torch": torch.__version__}

            def before(made: CalibrationSet) -> dict[str, Any]:
                write_preview(made, out / PREVIEW)
                # Evenly from all shards.
                stride = -(-len(made) // LOOKED_AT)
                quality = set_quality(inversion.detector, made.load(range(0, len(made), stride)))
                return {} if quality is None else {"quality": quality.to_dict()}

            return writer.finish(
                {
                    "model": detector.source,
                    "model_path": located(detector.source),
                    "versions": versions,
                },
                before,
            )


class _Progress:
    """Reports how many images are done, in all processes."""

    def __init__(
        self,
        writer: CalibrationWriter,
        plan: Plan,
        missing: list[int],
        tell: Callable[[int, int], None] | None,
    ) -> None:
        self.writer, self.plan, self.tell = writer, plan, tell
        self.waiting = set(missing)
        self.told = -1
        if not writer.complete:
            self._tell()

    def __call__(self) -> None:
        """Tell it, where it changed."""
        self.waiting = {index for index in self.waiting if not self.writer.recorded(index)}
        self._tell()

    def _tell(self) -> None:
        done = self.plan.images - sum(self.plan.count(index) for index in self.waiting)
        if self.tell is not None and done != self.told:
            self.told = done
            self.tell(done, self.plan.images)


def _maker(
    inversion: Inversion,
    detector: Model,
    settings: Synthesis,
    plan: Plan,
    writer: CalibrationWriter,
    count: int,
    together: int,
) -> ShardMaker:
    if count > 1:
        # A detector that cannot be sent to another process is not worth failing for.
        with contextlib.suppress(pickle.PicklingError, TypeError, AttributeError):
            return Workers(detector, settings, plan, writer, count, together)
    return lambda missing, report, written: make_shards(
        inversion, writer, plan, missing, report, written, together
    )


def _await_folder(out: Path) -> None:
    """Wait for what the leading process has just made to show; network file systems take a while.

    Raises:
        UserError: where it does not.
    """
    until = time.monotonic() + FOLDER_SECONDS
    while not CalibrationSet.is_one(out):
        if time.monotonic() > until:
            raise UserError(
                f"{out}: the leading process made this folder, and it does not show here; give an "
                "--out that every node sees"
            )
        time.sleep(0.1)

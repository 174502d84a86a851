"""How many shards are made side by side: as many as make a GPU quickest."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ..errors import UserError
from .inversion import Inversion
from .shards import Plan

MOST = 8
"""Shards that are tried side by side."""

TIMED = 14
"""Iterations that are timed, of which the first are done as they are and then recorded."""

FROM = 5
"""How many those are; the others are taken for what all further ones are."""

GAIN = 0.95
"""Of the time, what twice as many shards have to take for more to be tried."""

USABLE = 0.7
"""Of the free memory."""


def shards_at_once(
    asked: int | None,
    inversion: Inversion,
    plan: Plan,
    missing: list[int],
    note: Callable[[str], None] | None = None,
) -> int:
    """How many of the shards `missing` to make side by side in this process.

    Args:
        asked: so many, if there are as many shards; None: on a GPU as many as are quickest, tried
            for some seconds; else one, for on a CPU nothing is gained.
        inversion: that will make them.
        plan: of the set.
        missing: shards that will be made here.
        note: called with what was found.

    Raises:
        UserError: for several where that cannot be.
    """
    if asked is not None and asked < 1:
        raise UserError(f"shards at once: {asked} is no number of shards; 1 or more")
    if asked is not None and asked > 1 and not inversion.can_take_several:
        reason = "synthesis.micro_batch takes a shard in parts"
        if inversion.settings.micro_batch is None:
            reason = f"not with networks of the family {inversion.detector.family}"
        raise UserError(f"shards at once: {asked} side by side cannot be: {reason}; leave it out")
    if asked is not None:
        return max(1, min(asked, len(missing)))
    if inversion.detector.device.type != "cuda" or not inversion.can_take_several:
        return 1
    if len(missing) < 2 or not inversion.stages():
        return 1
    return _quickest(inversion, plan.count(missing[0]), len(missing), note)


def _quickest(
    inversion: Inversion, count: int, shards: int, note: Callable[[str], None] | None
) -> int:
    device = inversion.detector.device
    best, seconds, number = 1, float("inf"), 1
    torch.cuda.empty_cache()
    before, (free, _) = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)
    while number <= min(MOST, shards):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            estimate = seconds_of(inversion, count, number) * -(-shards // number)
        except torch.OutOfMemoryError:
            break
        need = torch.cuda.max_memory_reserved(device) - before
        enough = estimate > GAIN * seconds
        if estimate < seconds:
            best, seconds = number, estimate
        if enough or 2 * need > USABLE * free:
            break
        number *= 2
    torch.cuda.empty_cache()
    if note is not None:
        name = torch.cuda.get_device_name(device)
        note(
            f"synthesis: {best} {'shard' if best == 1 else 'shards'} of {count} images at once on "
            f"{name}, about {seconds:.0f} s"
        )
        if inversion.not_recorded:
            note(f"synthesis: without CUDA graphs, and slower ({inversion.not_recorded})")
    return best


def seconds_of(inversion: Inversion, count: int, shards: int) -> float:
    """What shards of `count` images each take side by side, from a few iterations of each stage."""
    device, total = inversion.detector.device, 0.0
    for stage in inversion.stages():
        marks: dict[int, float] = {}

        def after(step: int, _images: Tensor, marks: dict[int, float] = marks) -> None:
            if step in (FROM - 1, TIMED - 1):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                marks[step] = time.perf_counter()

        generators = [Generator().manual_seed(shard) for shard in range(shards)]
        # Drawn where it is wanted: on the processor that takes longer than the rest.
        draw = Generator(device).manual_seed(0)
        shape = (shards * count, 3, stage.side, stage.side)
        images = torch.rand(shape, generator=draw, device=device)
        labels = [
            row
            for g in generators
            for row in inversion.start_labels(g, count, inversion.detector.num_classes)
        ]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        inversion.optimise(images, labels, TIMED, 1e-3, generators, stage="timing", after=after)
        per_iteration = (marks[TIMED - 1] - marks[FROM - 1]) / (TIMED - FROM)
        total += marks[FROM - 1] - begin + per_iteration * max(stage.iterations - FROM, 0)
    return total

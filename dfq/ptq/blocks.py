"""Block reconstruction: rounding and activation scales of one block after another are learned.

Blocks are walked in the order they run. A block of the quantized network is given what the part
before it, already quantized, gives, and follows what the block of the float network gives there
(AdaRound, AdaQuant, BRECQ, QDrop, PD-Quant, SPQ, MGRQ, PFCR; see `objectives`). Rounding variables
are AdaRound's; AdaQuant learns the weights in their place. PFCR walks the network several times, by
ever coarser units (see `units`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..graph.execution import calls_in_order, is_inside, last_layer_of_block
from ..models.base import Model, Targets
from ..runtime.precision import resolve_precision
from .block_cache import BlockOutputCache
from .block_io import ROOM
from .block_learning import Block, Reconstruction
from .fisher import fisher_diagonals
from .gptq import without_fine_activations
from .input_moments import execution_order
from .objectives import Method
from .units import Unit, progressive_stages, units_of

BATCH = 16
"""Images of one iteration."""


def reconstruct(
    student: Model,
    teacher: Model,
    images: Tensor,
    method: Method,
    *,
    iterations: int,
    batch_size: int = BATCH,
    seed: int = 0,
    room: int = ROOM,
    targets: Callable[[int], Targets] | None = None,
    first: int = 0,
    after: Callable[[int, int], None] | None = None,
) -> None:
    """Learn the rounding of every quantized layer of `student`, block by block.

    Args:
        student: quantizers inserted and calibrated; weights still those of the teacher, or rounded
            by GPTQ. Changed in place: its weights lie on their grids afterwards.
        teacher: the float network it is a copy of, folded.
        images: uint8 `(n, 3, h, w)`, RGB.
        method: the objective and how it is used.
        iterations: of each block.
        batch_size: images of one iteration.
        seed: fixes the order of batches and what is dropped.
        room: bytes of inputs and outputs of a block that are kept on the host.
        targets: gives the labels of a batch by its number; asked for by objectives that look at
            them.
        first: how many units are finished, of an earlier call that was interrupted.
        after: called with units done and units in all after each unit.
    """
    batches = [batch.to(student.device).float() / 255 for batch in images.split(batch_size)]
    counts = execution_order(student.module, lambda: student.raw(batches[0][:1]))
    order = list(counts)
    if method.progressive:
        stages = progressive_stages(student, order, batches[0][:1])
    else:
        stages = [[(name,) for name in units_of(student, order, layers=method.layers)]]
    total, before = sum(len(units) for units in stages), 0
    for units in stages:
        # Of a stage that is finished nothing is needed but the weights and scales.
        if before + len(units) > first:
            _walk(
                student, teacher, batches, method, units, order,
                iterations=iterations, seed=seed, room=room, targets=targets,
                before=before, first=first, after=lambda done: after and after(done, total),
            )  # fmt: skip
        before += len(units)


def _walk(
    student: Model,
    teacher: Model,
    batches: list[Tensor],
    method: Method,
    units: Sequence[Unit],
    order: Sequence[str],
    *,
    iterations: int,
    seed: int,
    room: int,
    targets: Callable[[int], Targets] | None,
    before: int,
    first: int,
    after: Callable[[int], object],
) -> None:
    """One walk over the network, for `reconstruct`.

    Args:
        units: in the order in which they end.
        order: names of the quantized layers as they run.
        before: units of the walks before this one.
        first: how many units of all walks are finished.
        after: called with how many units of all walks are done, after each.
    """
    blocks = student.blocks()
    ended = last_layer_of_block(order, blocks)
    calls = calls_in_order(
        [(unit[0], student.module.get_submodule(unit[0])) for unit in units],
        lambda: student.raw(batches[0][:1]),
    )
    fisher = (
        fisher_diagonals(teacher, [unit[-1] for unit in units], batches, seed=seed)
        if method.fisher
        else {}
    )
    tail = teacher.clone()
    with (
        torch.no_grad(),
        without_fine_activations(student.module),
        student.shared_proposals(teacher, batches),
        tail.shared_proposals(teacher, batches),
        BlockOutputCache.of(student, batches, blocks) as ours,
        BlockOutputCache.of(teacher, batches, blocks) as theirs,
    ):
        shared = Reconstruction(
            student,
            teacher,
            batches,
            method,
            iterations,
            seed,
            room,
            targets,
            resolve_precision("auto", student.device, "quantization"),
            ours,
            theirs,
            tail,
            fisher,
        )
        for number, unit in enumerate(units, before):
            # From here on the tail computes this unit as the quantized network does.
            for name in unit:
                inside = student.module.get_submodule(name)
                tail.module.get_submodule(name).forward = inside.__call__
            if number >= first:
                from_integers = method.start == "gptq" or before > 0
                Block(shared, unit, calls[unit[0]], number, from_integers=from_integers).learn()
            for layer in order:
                learned = any(is_inside(layer, name) for name in unit)
                if learned and layer in ended:
                    ours.finish(ended[layer])
                    theirs.finish(ended[layer])
            if number >= first:
                after(number + 1)

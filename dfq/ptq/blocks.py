"""Block reconstruction: rounding and activation scales of one block after another are learned.

Blocks are walked in the order they run. A block of the quantized network is given what the part
before it, already quantized, gives, and follows what the block of the float network gives there
(AdaRound, AdaQuant, BRECQ, QDrop, PD-Quant, SPQ, MGRQ; see `objectives`). Rounding variables are
AdaRound's; AdaQuant learns the weights in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..graph.execution import calls_in_order, last_layer_of_block
from ..models.base import Model, Targets
from ..runtime.precision import resolve_precision
from .block_cache import BlockOutputCache
from .block_io import ROOM
from .block_learning import Block, Reconstruction
from .fisher import fisher_diagonals
from .gptq import without_fine_activations
from .input_moments import execution_order
from .objectives import Method

BATCH = 16
"""Images of one iteration."""


def units_of(model: Model, order: Sequence[str], *, layers: bool) -> list[str]:
    """Names of the modules that are reconstructed, in the order in which they end: the blocks that
    hold quantized layers, and quantized layers outside any block; or all layers by themselves.

    Args:
        model: quantized.
        order: names of its quantized layers as they run.
        layers: each layer by itself.
    """
    if layers:
        return list(order)
    ended = last_layer_of_block(order, model.blocks())
    units: list[str] = []
    for layer in order:
        if layer in ended:
            units.append(ended[layer])
        elif not any(f"{layer}.".startswith(f"{block}.") for block in ended.values()):
            units.append(layer)
    return units


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
        first: how many blocks are finished, of an earlier call that was interrupted.
        after: called with blocks done and blocks in all after each block.
    """
    batches = [batch.to(student.device).float() / 255 for batch in images.split(batch_size)]
    counts = execution_order(student.module, lambda: student.raw(batches[0][:1]))
    order = list(counts)
    units = units_of(student, order, layers=method.layers)
    blocks = student.blocks()
    ended = last_layer_of_block(order, blocks)
    calls = calls_in_order(
        [(name, student.module.get_submodule(name)) for name in units],
        lambda: student.raw(batches[0][:1]),
    )
    fisher = fisher_diagonals(teacher, units, batches, seed=seed) if method.fisher else {}
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
        for done, name in enumerate(units):
            # From here on the tail computes this block as the quantized network does.
            tail.module.get_submodule(name).forward = student.module.get_submodule(name).__call__
            if done >= first:
                Block(shared, name, calls[name], done).learn()
            for layer in order:
                inside = f"{layer}.".startswith(f"{name}.")
                if inside and layer in ended:
                    ours.finish(ended[layer])
                    theirs.finish(ended[layer])
            if after is not None and done >= first:
                after(done + 1, len(units))

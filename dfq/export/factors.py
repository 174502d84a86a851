"""Whether the grids of sums are such that LiteRT can add on them."""

from __future__ import annotations

import torch
from torch import fx

from ..errors import UserError
from .passes import QUANTIZE, grid_at

MOST = 256.0
"""Steps of a sum in a step of what is added: XNNPACK takes fewer, and where they are beyond 2^28 or
so LiteRT's own kernel ends the process that opens the file."""


def require_addable(graph: fx.Graph) -> None:
    """Refuse a program whose sums are on grids that are out of all proportion to their operands'.

    Raises:
        UserError: names the sum and both ranges.
    """
    for node in graph.nodes:
        if node.target is not torch.ops.aten.add.Tensor or len(node.users) != 1:
            continue
        (consumer,) = node.users
        grids = [grid for grid in map(grid_at, node.args[:2]) if grid is not None]
        if consumer.target is not QUANTIZE or len(grids) < 2:
            continue
        largest = max(grid[0] for grid in grids)
        if largest >= MOST * consumer.args[1]:
            raise UserError(
                f"LiteRT cannot compute {_place(node)}: what is added reaches "
                f"{255 * largest:.3g}, and the sum, on the images that ranges were found on, "
                f"{255 * consumer.args[1]:.3g}; are these trained weights, and images like theirs?"
            )


def _place(node: fx.Node) -> str:
    """Which sum of the network it is, for people."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return f"the sum in {path}" if path else f"the sum {node.name}"

"""What is done to the graph of an exported program for LiteRT's converter alone, which goes wrong
where a tensor that is on a grid has several readers, or is put on another grid.

Found with litert-torch 0.10.0: it takes a quantize right behind a dequantize for nothing, whatever
the two grids are. And it lays tensors out with the channels last; where one reader of a tensor
needs them as they were, what becomes of the others depends on their order: layers were left in
float, tensors transposed that should not be, or nothing was written at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .passes import DEQUANTIZE, MONOTONE, QUANTIZE, WEIGHTED, describe, grid_at, negated_twice

_ATEN = torch.ops.aten

_CHANNELS_LAST = {
    *(*WEIGHTED, *MONOTONE, QUANTIZE, _ATEN.cat.default),
    *(_ATEN.avg_pool2d.default, _ATEN.adaptive_avg_pool2d.default),
    *(_ATEN.upsample_bilinear2d.vec, _ATEN.upsample_bilinear2d.default),
}
"""Beside functions of single values, what the converter computes with the channels last."""


def suit_converter(graph: fx.Graph) -> None:
    """Give every tensor one grid, where that is all that a file may hold, and tell the converter
    which of its readers need the channels where they are.

    Args:
        graph: of a program that is tidy; changed in place.
    """
    _read_first_grids(graph)
    _quantize_again(graph)
    graph.lint()


def _read_first_grids(graph: fx.Graph) -> None:
    """Of a tensor that is put on one grid and then on another, as what a layer that is shared over
    several levels is given, read it on the first: the converter would leave the second one out.
    What gives its operand's own values is on the second grid itself, and the way there is kept in
    float."""
    # The last of several first.
    for node in reversed(list(graph.nodes)):
        first = node.args[0].args[0] if _puts_on_grid(node) else None
        if grid_at(first) in (None, grid_at(node)):
            continue
        for user in list(node.users):
            if user.target in WEIGHTED or user.target is _ATEN.matmul.default or _pointwise(user):
                user.replace_input_with(node, first)
        quantized = node.args[0]
        if node.users:
            quantized.update_arg(0, negated_twice(graph, first, before=quantized))
            continue
        graph.erase_node(node)
        if not quantized.users:
            graph.erase_node(quantized)


def _quantize_again(graph: fx.Graph) -> None:
    """Where a tensor has several readers, put it on its grid once more for each one that needs the
    channels where they are, as outputs do: a transposition for one of them, and the converter
    forgets how the tensor lies."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.target is not DEQUANTIZE or value is None or value.ndim != 4:
            continue
        users = list(node.users)
        ordered = [u for u in users if u.target not in _CHANNELS_LAST and not _pointwise(u)]
        if len(users) < 2:
            continue
        grid = node.args[1:]
        for user in ordered:
            with graph.inserting_before(user):
                quantized = graph.call_function(QUANTIZE, (node, *grid))
                back = graph.call_function(DEQUANTIZE, (quantized, *grid))
            describe(quantized, node, node.args[5])
            describe(back, node, None)
            user.replace_input_with(node, back)


def _puts_on_grid(node: fx.Node) -> bool:
    return node.target is DEQUANTIZE and node.args[0].target is QUANTIZE


def _pointwise(node: fx.Node) -> bool:
    """Whether a node computes each number of its result from one number of each operand."""
    tags: Any = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags

"""What is done to the graph of an exported program before it is lowered.

Values stay what they are; the quantize and dequantize operations come to stand as runtimes look for
them: one pair a tensor, on both sides of operations that keep a tensor on its grid.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import fx

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_ATEN = torch.ops.aten

KEEPING = {
    *(_ATEN.max_pool2d.default, _ATEN.upsample_nearest2d.vec, _ATEN.upsample_nearest2d.default),
    *(_ATEN.view.default, _ATEN.reshape.default, _ATEN.permute.default, _ATEN.transpose.int),
    *(_ATEN.flatten.using_ints, _ATEN.slice.Tensor, _ATEN.select.int, _ATEN.squeeze.dim),
    *(_ATEN.unsqueeze.default, _ATEN.pixel_shuffle.default, _ATEN.expand.default),
    *(_ATEN.numpy_T.default, _ATEN.mT.default, _ATEN.contiguous.default, _ATEN.clone.default),
    *(_ATEN.unflatten.int, _ATEN.roll.default),
}
"""Give values that they are given, or zero, and so stay on a grid."""

_RESHAPING = {
    *(_ATEN.view.default, _ATEN.reshape.default, _ATEN.flatten.using_ints),
    _ATEN.unflatten.int,
}

MONOTONE = {
    *(_ATEN.max_pool2d.default, _ATEN.upsample_nearest2d.vec, _ATEN.upsample_nearest2d.default),
}
"""Of those, the ones that runtimes compute in integers: rounding before them is rounding after."""

WEIGHTED = {
    *(_ATEN.conv2d.default, _ATEN.conv2d.padding, _ATEN.conv_transpose2d.input),
    *(_ATEN.linear.default,),
}

SPLITTING = {
    *(_ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.chunk.default),
    *(_ATEN.unbind.int,),
}


def tidy(
    graph: fx.Graph, *, shield: bool = False, apart: bool = False, bare_joins: bool = False
) -> None:
    """Make one pair of operations of each grid on each tensor, and carry grids on.

    Args:
        graph: changed in place.
        shield: keep layers in float that are to be, between grids, from a runtime that would
            quantize their weights by itself.
        apart: do without concatenations of what is on several grids, or keep them in float, where
            a converter would put all of it on one of them.
        bare_joins: put nothing behind a concatenation of what is on the very grid that its result
            is on, for a runtime that would otherwise quantize each operand twice.
    """
    _drop_zeros(graph)
    _drop_idle_relus(graph)
    if apart:
        _take_apart(graph)
    _hoist(graph)
    _carry(graph)
    _merge(graph)
    if bare_joins:
        _bare_joins(graph)
    if shield:
        _shield(graph)
    if apart:
        _keep_apart(graph)
    graph.eliminate_dead_code()
    graph.lint()


def grid_at(node: Any) -> tuple[Any, ...] | None:
    """The grid that a tensor is on: what a dequantize was given; None for none."""
    if isinstance(node, fx.Node) and node.target is DEQUANTIZE:
        return tuple(node.args[1:6])
    return None


def _drop_zeros(graph: fx.Graph) -> None:
    """A number that is zero, added, is nothing; without it a grid is where its reader looks."""
    for node in list(graph.nodes):
        if node.target is _ATEN.add.Tensor and len(node.args) == 2:
            first, second = node.args
            if isinstance(second, int | float) and second == 0:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _drop_idle_relus(graph: fx.Graph) -> None:
    """A ReLU does nothing on a grid that begins at zero; without it the quantize stands directly
    on the layer."""
    for node in list(graph.nodes):
        if node.target in (_ATEN.relu.default, _ATEN.relu_.default):
            grid = grid_at(node.args[0])
            if grid is not None and grid[1] == grid[2]:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def keeps(node: fx.Node) -> bool:
    """Whether a node gives values of its first argument, or zero, and nothing else."""
    if node.target is _ATEN.pad.default:
        options: list[Any] = [*node.args[2:], *("constant", None)[len(node.args) - 2 :]]
        return options[0] != "constant" or not options[1]
    return node.target in KEEPING


def _hoist(graph: fx.Graph) -> None:
    """Quantize in front of poolings and enlargements what is quantized behind them."""
    for node in reversed(list(graph.nodes)):
        source, users = node.args[0] if node.args else None, list(node.users)
        if node.target not in MONOTONE or not users or not isinstance(source, fx.Node):
            continue
        grid = tuple(users[0].args[1:6])
        alike = all(u.target is QUANTIZE and tuple(u.args[1:6]) == grid for u in users)
        if not alike or grid_at(source) is not None:
            continue
        with graph.inserting_before(node):
            quantized = graph.call_function(QUANTIZE, (source, *grid))
            back = graph.call_function(DEQUANTIZE, (quantized, *grid))
        describe(quantized, source, grid[4])
        describe(back, source, None)
        node.update_arg(0, back)


def _carry(graph: fx.Graph) -> None:
    """Quantize and dequantize again behind what keeps a tensor on its grid."""
    for node in list(graph.nodes):
        if node.target in SPLITTING:
            continue
        if node.target is operator.getitem and node.args[0].target in SPLITTING:
            grid = grid_at(node.args[0].args[0])
        elif keeps(node):
            grid = grid_at(node.args[0])
        else:
            continue
        if grid is None:
            continue
        users = list(node.users)
        if all(user.target is QUANTIZE and tuple(user.args[1:6]) == grid for user in users):
            continue
        with graph.inserting_after(node):
            quantized = graph.call_function(QUANTIZE, (node, *grid))
        with graph.inserting_after(quantized):
            back = graph.call_function(DEQUANTIZE, (quantized, *grid))
        describe(quantized, node, grid[4])
        describe(back, node, None)
        for user in users:
            user.replace_input_with(node, back)


def _bare_joins(graph: fx.Graph) -> None:
    """Take the pair away behind a concatenation whose operands are all on its grid."""
    for node in list(graph.nodes):
        if node.target is not _ATEN.cat.default:
            continue
        grids, users = {grid_at(part) for part in node.args[0]}, list(node.users)
        if len(grids) > 1 or None in grids:
            continue
        for user in users:
            if user.target is QUANTIZE and tuple(user.args[1:6]) in grids:
                for back in list(user.users):
                    back.replace_all_uses_with(node)


def describe(new: fx.Node, source: fx.Node, dtype: torch.dtype | None) -> None:
    """Say of a new node that its tensor has the shape of another's.

    Args:
        new: a node of the graph.
        source: whose tensor has that shape.
        dtype: of the new tensor; None: the source's.
    """
    value = source.meta.get("val")
    if value is not None:
        new.meta["val"] = value if dtype is None else value.to(dtype)


def _shield(graph: fx.Graph) -> None:
    """Between a grid and a layer whose weight is on none, cut off where the grid ends: this changes
    no value, and takes the layer out of the pattern that runtimes look for."""
    for node in list(graph.nodes):
        grid = grid_at(node.args[0]) if node.target in WEIGHTED else None
        if grid is None or getattr(node.args[1], "op", "") == "call_function":
            continue
        scale, zero, low, high, _ = grid
        ends = scale * (low - zero), scale * (high - zero)
        with graph.inserting_before(node):
            cut = graph.call_function(_ATEN.clamp.default, (node.args[0], *ends))
        describe(cut, node.args[0], None)
        node.update_arg(0, cut)


def _take_apart(graph: fx.Graph) -> None:
    """Leave out concatenations whose results are taken apart again at the same places, whatever is
    done to their shapes in between."""
    for node in list(graph.nodes):
        if node.target is _ATEN.cat.default:
            parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
            _hand_on(graph, node, list(parts), axis % node.meta["val"].ndim)
    graph.eliminate_dead_code()


def _hand_on(graph: fx.Graph, whole: fx.Node, parts: list[fx.Node], axis: int) -> None:
    """Give those readers of `whole` that take some of `parts` out of it these alone.

    Args:
        graph: changed in place.
        whole: `parts` side by side.
        parts: tensors.
        axis: along which they are.
    """
    shape = whole.meta["val"].shape
    for user in list(whole.users):
        if user.target is _ATEN.slice.Tensor:
            slicing: list[Any] = [*user.args[1:], *(0, 0, None, 1)[len(user.args) - 1 :]]
            dim, start, end, step = slicing
            if dim % len(shape) != axis or step != 1:
                continue
            start, end = start or 0, shape[axis] if end is None else min(end, shape[axis])
            sizes = [part.meta["val"].shape[axis] for part in parts]
            ends = list(itertools.accumulate(sizes, initial=0))
            if start in ends and end in ends and 0 < end - start < ends[-1]:
                inside = parts[ends.index(start) : ends.index(end)]
                user.replace_all_uses_with(_side_by_side(graph, user, inside, axis))
        elif user.target is _ATEN.permute.default:
            order = [dim % len(shape) for dim in user.args[1]]
            moved = [_applied(graph, user, part) for part in parts]
            _hand_on(graph, user, moved, order.index(axis))
        elif user.target in (_ATEN.contiguous.default, _ATEN.clone.default):
            _hand_on(graph, user, [_applied(graph, user, part) for part in parts], axis)
        elif user.target in _RESHAPING:
            for again in list(user.users):
                if again.target in _RESHAPING and again.meta["val"].shape == shape:
                    _hand_on(graph, again, parts, axis)


def _side_by_side(graph: fx.Graph, before: fx.Node, parts: list[fx.Node], axis: int) -> fx.Node:
    """A concatenation of parts; of one, the part."""
    if len(parts) == 1:
        return parts[0]
    with graph.inserting_before(before):
        joined = graph.call_function(_ATEN.cat.default, (parts, axis))
    joined.meta["val"] = _ATEN.cat.default([part.meta["val"] for part in parts], axis)
    return joined


def _applied(graph: fx.Graph, function: fx.Node, node: fx.Node) -> fx.Node:
    """What a node does to its first argument, done to another one."""
    rest = function.args[1:]
    with graph.inserting_before(function):
        applied = graph.call_function(function.target, (node, *rest), dict(function.kwargs))
    applied.meta["val"] = function.target(node.meta["val"], *rest, **function.kwargs)
    return applied


def _keep_apart(graph: fx.Graph) -> None:
    """Between grids that differ and a concatenation that is on none, change the sign and back: this
    changes no value. Zeros added, ones multiplied with and limits are folded, or carried on too."""
    for node in list(graph.nodes):
        if node.target not in (_ATEN.cat.default, _ATEN.stack.default):
            continue
        grids = {grid_at(part) for part in node.args[0]}
        if len(grids) == 1 or any(user.target is QUANTIZE for user in node.users):
            continue
        parts = [
            part if grid_at(part) is None else negated_twice(graph, part, before=node)
            for part in node.args[0]
        ]
        node.update_arg(0, parts)


def negated_twice(graph: fx.Graph, node: fx.Node, *, before: fx.Node) -> fx.Node:
    """A tensor's own values, computed in float in front of another operation."""
    back = node
    with graph.inserting_before(before):
        for _ in range(2):
            back = graph.call_function(_ATEN.neg.default, (back,))
            describe(back, node, None)
    return back


def _merge(graph: fx.Graph) -> None:
    """One operation where several do the same to one tensor, and none where a tensor is on that
    very grid already."""
    by_key: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target not in (QUANTIZE, DEQUANTIZE):
            continue
        if node.target is QUANTIZE and grid_at(node.args[0]) == tuple(node.args[1:6]):
            node.replace_all_uses_with(node.args[0].args[0])
            graph.erase_node(node)
            continue
        key = (node.target, *node.args)
        if key in by_key:
            node.replace_all_uses_with(by_key[key])
            graph.erase_node(node)
        else:
            by_key[key] = node


def has_wide_grids(graph: fx.Graph) -> bool:
    """Whether any tensor is on a grid of 16 bits."""
    wide = (torch.int16, torch.uint16)
    return any(node.target is QUANTIZE and node.args[5] in wide for node in graph.nodes)

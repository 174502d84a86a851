"""What LiteRT's specification of 8-bit quantization asks of a file, read from its bytes.

Written from the specification, and not from what is exported: int8 alone; weights a scale an
output channel, without zero point, from -127 to 127; biases int32 with the product of the steps;
one grid on both sides of what only moves values; LOGISTIC and SOFTMAX give 1/256 from -128.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

WEIGHTED = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0}
"""By operation, the axis of its weights that has the output channels."""

KEEPING = ("CONCATENATION", "MAX_POOL_2D", "RESIZE_NEAREST_NEIGHBOR", "RESHAPE", "TRANSPOSE")
SHARES = ("LOGISTIC", "SOFTMAX")


class Operation:
    """One operation: its name, and what it reads and gives."""

    def __init__(self, name: str, inputs: list[Any], outputs: list[Any]) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs


def operations_of(path: Path) -> tuple[list[Operation], list[Any]]:
    """Operations of a file, and all its tensors, each with its bytes as `values`."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if name[0] != "_"}
    kinds = {value: name for name, value in vars(schema.TensorType).items() if name[0] != "_"}
    graph = model.subgraphs[0]
    for tensor in graph.tensors:
        data = model.buffers[tensor.buffer].data
        tensor.values = None if data is None else np.asarray(data, np.uint8)
        tensor.kind = kinds[tensor.type]
    found = []
    for one in graph.operators:
        code = model.operatorCodes[one.opcodeIndex]
        name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        inputs = [graph.tensors[index] for index in one.inputs if index >= 0]
        found.append(Operation(name, inputs, [graph.tensors[index] for index in one.outputs]))
    return found, graph.tensors


def grid_of(tensor: Any) -> tuple[tuple[float, ...], tuple[int, ...]] | None:
    """Steps and zero points; None for none."""
    said = tensor.quantization
    if said is None or said.scale is None or len(said.scale) == 0:
        return None
    return tuple(map(float, said.scale)), tuple(map(int, said.zeroPoint))


def violations(path: Path) -> list[str]:
    """Rules that a file breaks, a line each that begins with the rule's name.

    Rules: `no grids`, `type`, `weight`, `bias`, `keeping`, `share`.
    """
    operations, tensors = operations_of(path)
    whole = [one for one in operations if one.name in WEIGHTED and one.inputs[0].kind == "INT8"]
    if not whole:
        return ["no grids: no layer is computed in integers"]
    found = [f"type: {t.name} is {t.kind}" for t in tensors if t.kind in ("UINT8", "INT16")]
    for one in whole:
        if one.inputs[1].values is not None:
            found += _layer(one)
    for one in operations:
        where = f"{one.name} {one.outputs[0].name.decode()}"
        if one.name in KEEPING and one.outputs[0].kind == "INT8":
            sides = {grid_of(t) for t in (*one.inputs, *one.outputs) if t.kind == "INT8"}
            if len(sides) != 1:
                found.append(f"keeping: {where} has {len(sides)} grids")
        elif one.name in SHARES and one.outputs[0].kind == "INT8":
            grid = grid_of(one.outputs[0])
            found += [f"share: {where} has {grid}"] if grid != ((1 / 256,), (-128,)) else []
    return found


def _layer(one: Operation) -> list[str]:
    source, weight, *bias = one.inputs
    name, axis = one.outputs[0].name.decode(), WEIGHTED[one.name]
    grid, given = grid_of(weight), grid_of(source)
    if weight.kind != "INT8" or grid is None or given is None:
        return [f"weight: that of {name} is no int8 on a grid"]
    found = []
    steps, points = grid
    if len(steps) != weight.shape[axis] or weight.quantization.quantizedDimension != axis:
        found.append(f"weight: that of {name} has no step for each output")
    if any(points):
        found.append(f"weight: that of {name} has a zero point")
    if weight.values.view(np.int8).min() < -127:
        found.append(f"weight: that of {name} uses -128")
    for tensor in bias:
        wanted = np.float32(given[0][0]) * np.asarray(steps, np.float32)
        said = grid_of(tensor)
        fits = tensor.kind == "INT32" and said is not None and not any(said[1])
        if not fits or not np.allclose(said[0], wanted, rtol=1e-5, atol=0):
            found.append(f"bias: that of {name} has no step of its product")
    return found

"""Kernels of LiteRT (XNNPACK) against what is known of them, on all pairs of integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfq.export.kernels import LiteRtKernels
from dfq.export.on_grid import Grid, OnGrid, single

SIDE = 256
INTEGERS = torch.arange(-128, 128, dtype=torch.float64)
ROWS, COLUMNS = torch.meshgrid(INTEGERS, INTEGERS, indexing="ij")


def grid(scale: float, zero_point: int) -> Grid:
    return (scale, zero_point, -128, 127, torch.int8)


def on(grid: Grid, integers: Tensor) -> OnGrid:
    return OnGrid(integers, single(grid[0]), *grid[1:4], grid=grid)


def litert(operation: str, given: list[OnGrid], wanted: Grid, path: Path, **options: Any) -> Tensor:
    """What LiteRT computes of tensors on grids, in a file of that one operation."""
    flatbuffers = pytest.importorskip("flatbuffers")
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    model, graph, code, node = (
        getattr(schema, f"{kind}T")() for kind in ("Model", "SubGraph", "OperatorCode", "Operator")
    )
    code.builtinCode = code.deprecatedBuiltinCode = getattr(
        schema.BuiltinOperator, operation.upper()
    )
    code.version = 2
    kind = f"{operation.capitalize()}Options"
    node.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
    node.builtinOptions = getattr(schema, f"{kind}T")()
    for name, value in options.items():
        setattr(node.builtinOptions, name, value)
    graph.tensors = []
    for place in (*(one.grid for one in given), wanted):
        tensor, steps = schema.TensorT(), schema.QuantizationParametersT()
        tensor.shape, tensor.type = [1, SIDE, SIDE, 1], schema.TensorType.INT8
        tensor.buffer, tensor.name = 0, f"tensor{len(graph.tensors)}"
        steps.scale, steps.zeroPoint = [place[0]], [place[1]]
        tensor.quantization = steps
        graph.tensors.append(tensor)
    node.inputs = graph.inputs = list(range(len(given)))
    node.outputs = graph.outputs = [len(given)]
    node.opcodeIndex, graph.operators = 0, [node]
    model.version, model.operatorCodes, model.subgraphs = 3, [code], [graph]
    model.buffers = [schema.BufferT()]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    opened = interpreter.Interpreter(str(path), num_threads=1)
    opened.allocate_tensors()
    for index, one in zip(graph.inputs, given, strict=True):
        opened.set_tensor(index, one.integers.numpy().astype(np.int8).reshape(1, SIDE, SIDE, 1))
    opened.invoke()
    return torch.from_numpy(opened.get_tensor(len(given)).reshape(SIDE, SIDE)).double()


@pytest.mark.parametrize("ratio", [1 / 300, 1 / 200, 0.04, 0.37, 0.81, 1.0, 1.27, 9.3])
@pytest.mark.parametrize("zero_point", [-128, 5])
def test_one_grid_to_another_has_few_bits(ratio: float, zero_point: int, tmp_path: Path) -> None:
    """Of the quotient of the steps, 8 behind the point."""
    x, wanted = on(grid(0.0371, 7), ROWS), grid(0.0371 / ratio, zero_point)
    found = litert("quantize", [x], wanted, tmp_path / "x.tflite")
    assert torch.equal(found, LiteRtKernels().move(x, wanted))


@pytest.mark.parametrize(
    "scales", [(0.0371, 0.0523, 0.0918), (0.02, 0.02, 0.04), (0.1, 0.003, 0.07)]
)
@pytest.mark.parametrize("relu", [False, True])
def test_a_sum_is_in_fixed_point_and_a_relu_within_it(
    scales: tuple[float, float, float], relu: bool, tmp_path: Path
) -> None:
    a, b = on(grid(scales[0], 7), ROWS), on(grid(scales[1], -11), COLUMNS)
    wanted = grid(scales[2], -20)
    options = {"fusedActivationFunction": int(relu)}
    found = litert("add", [a, b], wanted, tmp_path / "x.tflite", **options)
    total = LiteRtKernels().add(a, b, wanted)
    assert torch.equal(found, total.clamp(min=-20) if relu else total)

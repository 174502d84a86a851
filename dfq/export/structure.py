"""Whether an ONNX file has its grids as TensorRT wants them, for where TensorRT cannot be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .dependencies import require

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

MOST_NAMED = 5


def structure_faults(file: Path) -> list[str]:
    """What explicit quantization does not allow, a line each; empty: nothing was found.

    Looked at are: that there are grids at all, that they are of int8 without a zero point (those
    of weights, a scale a channel at most; of activations, one scale), and that a layer with a grid
    on its weights has one on its other input, without which it is computed in float.

    Args:
        file: an ONNX file.
    """
    onnx = require("onnx", "An .onnx file")
    arrays = require("onnx.numpy_helper", "An .onnx file")
    graph = onnx.load(str(file)).graph
    makers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def values(name: str) -> Any:
        return arrays.to_array(constants[name]) if name in constants else None

    grids = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if not grids:
        return ["no grids: TensorRT would compute all of it in float"]
    faults: list[str] = []
    zero, unsigned, spread, single = [], [], [], []
    for node in grids:
        point = values(node.input[2]) if len(node.input) > 2 else None
        scale = values(node.input[1])
        of_weights = node.op_type == "DequantizeLinear" and node.input[0] in constants
        if point is not None and point.dtype.name not in ("int8", "int32"):
            unsigned.append(node.name)
        if point is not None and point.any():
            zero.append(node.name)
        if not of_weights and (scale is None or scale.size != 1):
            spread.append(node.name)
    for node in graph.node:
        if node.op_type not in _LAYERS:
            continue
        sides = [_on_grid(name, makers) for name in node.input[:2]]
        if any(sides) and not all(sides):
            single.append(node.name)
    for names, problem in (
        (zero, "have a zero point, and TensorRT takes symmetric grids alone"),
        (unsigned, "are not of int8"),
        (spread, "on activations have no single scale that is a constant"),
        (single, "have a grid on one input alone, and would be computed in float"),
    ):
        if names:
            listed = ", ".join(names[:MOST_NAMED])
            subject = "layers" if names is single else "grids"
            faults.append(f"{len(names)} {subject} {problem}: {listed}")
    return faults


def _on_grid(name: str, makers: dict[str, Any]) -> bool:
    """Whether a value comes from a grid, through what only moves it."""
    while name in makers:
        node = makers[name]
        if node.op_type == "DequantizeLinear":
            return True
        if node.op_type not in ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Split"):
            return False
        name = node.input[0]
    return False

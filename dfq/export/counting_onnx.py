"""Integer operations of onnxruntime's own optimised graph."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .counting import IntegerShare, Operation
from .dependencies import require
from .opening import OnnxFile

_CONVOLUTIONS = {"Conv", "FusedConv", "ConvInteger", "QLinearConv", "ConvTranspose"}
_PRODUCTS = {
    *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat"),
    *("QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "MatMulNBits"),
}
_INTEGER = {
    *("ConvInteger", "QLinearConv", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul"),
    *("QGemm", "DynamicQuantizeMatMul"),
}
_WEIGHT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
"""Which input the weight is; else the second."""

_PASSING = {"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten"}


def count_onnx(file: OnnxFile) -> IntegerShare:
    """The share of MACs that onnxruntime computes in integers, after its graph optimisation."""
    graph, shapes = optimised_graph(file.path, file.image)
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    layers = []
    for node in graph.node:
        if node.op_type not in _CONVOLUTIONS | _PRODUCTS:
            continue
        weight = node.input[_WEIGHT.get(node.op_type, 1)]
        out, of_weight = shapes[node.output[0]], shapes[weight]
        if node.op_type in _CONVOLUTIONS:
            transposed = node.op_type == "ConvTranspose"
            size = math.prod(of_weight[1:])
            macs = math.prod(shapes[node.input[0]] if transposed else out) * size
        else:
            input_shape = shapes[node.input[0]]
            turned = any(a.name == "transA" and a.i for a in node.attribute)
            macs = math.prod(out) * (input_shape[-2] if turned else input_shape[-1])
        integers = node.op_type in _INTEGER
        reason = None if integers else _reason(node, weight, makers, consumers, constants)
        layers.append(
            Operation(node.name or node.output[0], node.op_type, macs // out[0], integers, reason)
        )
    return IntegerShare(tuple(layers), "onnxruntime's optimised graph")


def optimised_graph(path: Path, image: np.ndarray) -> tuple[Any, dict[str, list[int]]]:
    """onnxruntime's optimised graph, an `onnx.GraphProto`, and the shape of every tensor that a
    layer reads or writes in it.

    Args:
        path: of the file.
        image: what it is given, of its type and layout.
    """
    onnx, ort = require("onnx", "Counting"), require("onnxruntime", "Counting")
    levels = ort.GraphOptimizationLevel
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimised.onnx"
        # The level above lays float convolutions out anew, and merges nothing more into integers.
        options = _options(ort, levels.ORT_ENABLE_EXTENDED)
        options.optimized_model_filepath = str(target)
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(str(target))
        graph = onnx.GraphProto()
        graph.CopyFrom(model.graph)
        constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        named = {output.name for output in graph.output}
        computed = {name for node in graph.node for name in node.output}
        wanted: dict[str, None] = {}
        for node in graph.node:
            if node.op_type in _CONVOLUTIONS | _PRODUCTS:
                for name in (*node.input, node.output[0]):
                    if name in computed and name not in named:
                        wanted[name] = None
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        onnx.save(model, str(target))
        options = _options(ort, levels.ORT_DISABLE_ALL)
        session = ort.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        input_name = session.get_inputs()[0].name
        values = session.run(names, {input_name: image})
    shapes = {name: list(value.shape) for name, value in zip(names, values, strict=True)}
    return graph, {input_name: list(image.shape), **constants, **shapes}


def _options(ort: Any, level: Any) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    return options


def _reason(
    node: Any,
    weight: str,
    makers: dict[str, Any],
    consumers: dict[str, list[Any]],
    constants: dict[str, Any],
) -> str:
    """Why a layer of the optimised graph is computed in float."""
    onnx = require("onnx", "Counting")

    def source(name: str) -> Any:
        while (maker := makers.get(name)) is not None and maker.op_type in _PASSING:
            name = maker.input[0]
        return maker

    def bits(dequantize: Any) -> str | None:
        tensor = constants.get(dequantize.input[2] if len(dequantize.input) > 2 else "")
        if tensor is None:
            tensor = constants.get(dequantize.input[0])
        if tensor is None:
            return None
        return str(onnx.TensorProto.DataType.Name(tensor.data_type))

    data, of_weight = source(node.input[0]), source(weight)
    if node.op_type == "MatMulNBits":
        return "its weights alone are integers"
    quantized = [
        operand is not None and operand.op_type == "DequantizeLinear"
        for operand in (data, of_weight)
    ]
    if not any(quantized):
        return "it is not quantized"
    if not quantized[0]:
        return "its input is on no grid"
    if not quantized[1]:
        return "its weight is on no grid"
    for role, operand in (("activations", data), ("weights", of_weight)):
        kind = bits(operand)
        if kind not in ("INT8", "UINT8", None):
            return f"{role} of {kind}: there are kernels for 8 bits alone"
    if bits(data) == "INT8":
        return "signed activations: it has integer kernels for unsigned ones"
    after = consumers.get(node.output[0], [])
    if any(consumer.op_type == "QuantizeLinear" for consumer in after):
        return "its output is read in float as well as on a grid"
    if not after or _leads_out(node, consumers):
        return "a last layer: its output is on no grid"
    follow = ", ".join(sorted({consumer.op_type for consumer in after}))
    return f"no quantize directly on its output ({follow} follow)"


def _leads_out(node: Any, consumers: dict[str, list[Any]]) -> bool:
    """Whether no other layer depends on the node's output."""
    visited, pending = set(), list(node.output)
    while pending:
        for consumer in consumers.get(pending.pop(), []):
            if consumer.op_type in _CONVOLUTIONS | _PRODUCTS:
                return False
            for name in consumer.output:
                if name not in visited:
                    visited.add(name)
                    pending.append(name)
    return True

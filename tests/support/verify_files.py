"""Runs, exports and files broken on purpose, for the tests of `dfq verify`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dfq.export.writers import KEY

QUICK = {
    "method": "ptq",
    "quantization.reconstruction": "none",
    "quantization.ranges": "minmax",
    "quantization.calibration_images": 8,
    "quantization.refine_images": 0,
    "quantization.placement": "qdq",
}
"""A W8A8 run in seconds."""


def changed(source: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of an ONNX file, changed."""
    model = onnx.load(str(source))
    change(model)
    onnx.save(model, str(target))
    return target


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def set_constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


def weights(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The dequantize operations of the weights of convolutions."""
    makers = {name: node for node in model.graph.node for name in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    return [
        makers[node.input[1]]
        for node in convolutions
        if node.input[1] in makers and makers[node.input[1]].op_type == "DequantizeLinear"
    ]


def wrong_scale(model: onnx.ModelProto) -> None:
    """One layer's weights a quarter too large."""
    name = weights(model)[3].input[1]
    set_constant(model, name, (constant(model, name) * 1.25).astype(np.float32))


def permuted_weight(model: onnx.ModelProto) -> None:
    """The input channels of one layer in another order."""
    name = next(n.input[0] for n in weights(model)[2:] if constant(model, n.input[0]).shape[1] > 8)
    set_constant(model, name, np.ascontiguousarray(constant(model, name)[:, ::-1]))


def missing_sigmoid(model: onnx.ModelProto) -> None:
    """Scores as logits."""
    makers = {name: node for node in model.graph.node for name in node.output}
    name = "scores"
    while makers[name].op_type != "Sigmoid":
        name = makers[name].input[0]
    makers[name].op_type = "Identity"


def float_layers(model: onnx.ModelProto) -> None:
    """No convolution has its output on a grid."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    instead = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in makers:
            quantize = makers[node.input[0]]
            source = makers.get(quantize.input[0])
            if source is not None and source.op_type == "Conv":
                instead[node.output[0]] = quantize.input[0]
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = instead.get(name, name)


def nobodys(model: onnx.ModelProto) -> None:
    """Without what dfq wrote of it."""
    kept = [one for one in model.metadata_props if one.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.producer_name = "pytorch"


def on_grid(model: onnx.ModelProto, tensor: str, low: float, high: float) -> str:
    """Put a tensor on a grid of 8 bits, for all its readers; returns its new name."""
    scale = (high - low) / 255
    names = [f"{tensor}/{part}" for part in ("scale", "zero", "quantized", "on grid")]
    values = [np.float32(scale), np.uint8(round(-low / scale))]
    for name, value in zip(names, values, strict=False):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == tensor:
                node.input[index] = names[3]
    pair = [
        helper.make_node("QuantizeLinear", [tensor, *names[:2]], [names[2]]),
        helper.make_node("DequantizeLinear", [names[2], *names[:2]], [names[3]]),
    ]
    place = next(i for i, n in enumerate(model.graph.node) if tensor in n.output) + 1
    for node in reversed(pair):
        model.graph.node.insert(place, node)
    return names[3]


def as_ultralytics(model: onnx.ModelProto, *, high: float | None = None) -> None:
    """One output `(1, 4 + classes, A)`: centre and size, and scores; on one grid up to `high`."""
    graph = model.graph
    nobodys(model)
    anchors = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    classes = graph.output[1].type.tensor_type.shape.dim[2].dim_value
    matrix = np.array(
        [[0.5, 0, -1, 0], [0, 0.5, 0, -1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]], np.float32
    )
    graph.initializer.append(numpy_helper.from_array(matrix, "to xywh"))
    graph.node.extend(
        [
            helper.make_node("MatMul", ["boxes", "to xywh"], ["xywh"]),
            helper.make_node("Concat", ["xywh", "scores"], ["rows"], axis=2),
            helper.make_node("Transpose", ["rows"], ["together"], perm=[0, 2, 1]),
        ]
    )
    last = "together" if high is None else on_grid(model, "together", 0.0, high)
    graph.node.append(helper.make_node("Identity", [last], ["output0"]))
    del graph.output[:]
    shape = [1, 4 + classes, anchors]
    graph.output.append(helper.make_tensor_value_info("output0", TensorProto.FLOAT, shape))

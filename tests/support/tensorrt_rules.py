"""What explicit quantization of TensorRT asks of an ONNX graph, rule by rule, on the whole graph.

Written from TensorRT's documentation of explicit quantization, and not from what is exported:
symmetric int8 alone; a scale a channel for weights, which have a dequantize and no quantize; biases
in float; one scale on both sides of a max-pool and across a concatenation; the residual operand of
a sum on a grid and the one that a layer computes not; nothing between a layer and its activation.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ACTIVATIONS = ("Sigmoid", "Relu", "LeakyRelu", "HardSigmoid", "HardSwish", "Clip", "Tanh", "Gelu")
KEEPING = ("MaxPool", "Resize")
"""Give values that they are given, and are computed in integers where both sides have one grid."""


class Graph:
    """Nodes by what they give and by what they read."""

    def __init__(self, path: Path) -> None:
        graph = onnx.load(path).graph
        self.nodes = list(graph.node)
        self.constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.inner = self._inner()

    def of_kind(self, *kinds: str) -> list[Any]:
        return [node for node in self.nodes if node.op_type in kinds]

    def is_weight(self, name: str) -> bool:
        """Whether a value is a constant on a grid."""
        node = self.maker.get(name)
        return node is not None and node.op_type == "DequantizeLinear" and self.is_stored(node)

    def is_stored(self, node: Any) -> bool:
        """Whether what a node reads is in the file."""
        return node.input[0] in self.constants

    def quantized_layers(self) -> list[Any]:
        return [n for n in self.of_kind(*LAYERS) if any(self.is_weight(i) for i in n.input[:2])]

    def _inner(self) -> set[int]:
        """Nodes that some quantized layer is computed from: not the decoding behind the last."""
        found: set[int] = set()
        waiting = [name for node in self.quantized_layers() for name in node.input[:2]]
        while waiting:
            node = self.maker.get(waiting.pop())
            if node is not None and id(node) not in found:
                found.add(id(node))
                waiting += node.input
        return found

    def scale_of(self, name: str) -> float | None:
        """Step of the grid that a value comes from at once; None for none."""
        node = self.maker.get(name)
        if node is None or node.op_type != "DequantizeLinear" or self.is_stored(node):
            return None
        return float(self.constants[node.input[1]].reshape(-1)[0])

    def scales_behind(self, name: str) -> set[float | None]:
        """Steps of the grids that a value is put on, one for each reader; None for none."""
        return {
            float(self.constants[node.input[1]].reshape(-1)[0])
            if node.op_type == "QuantizeLinear"
            else None
            for node in self.readers[name]
        }


def violations(path: Path) -> list[str]:
    """Rules that a file breaks, a line each that begins with the rule's name; none for a good one.

    Rules: `no grids`, `not int8`, `zero point`, `scales`, `weight`, `bias`, `input`, `activation`,
    `concat`, `keeping` and `sum`.
    """
    graph = Graph(path)
    layers = graph.quantized_layers()
    if not layers:
        return ["no grids: no layer has a weight on one"]
    found: list[str] = []
    for check in (_grids, _layers, _activations, _concatenations, _keeping, _sums):
        found += check(graph)
    return found


def _grids(graph: Graph) -> list[str]:
    found = []
    for node in graph.of_kind("QuantizeLinear", "DequantizeLinear"):
        scale = graph.constants.get(node.input[1])
        point = graph.constants[node.input[2]] if len(node.input) > 2 else None
        kind = np.dtype(np.uint8) if point is None else point.dtype
        if graph.is_stored(node):
            kind = graph.constants[node.input[0]].dtype
        if kind != np.int8:
            found.append(f"not int8: {node.name} has {kind}")
        if point is not None and point.any():
            found.append(f"zero point: {node.name} has one")
        if not graph.is_stored(node) and (scale is None or scale.size != 1):
            found.append(f"scales: {node.name} has more than one, or none that is constant")
    return found


def _layers(graph: Graph) -> list[str]:
    found = []
    for node in graph.of_kind(*LAYERS):
        source, weight = node.input[:2]
        maker = graph.maker.get(weight)
        if maker is not None and maker.op_type == "DequantizeLinear" and not graph.is_stored(maker):
            if node.op_type != "MatMul" and id(maker) in graph.inner:
                found.append(f"weight: that of {node.name} is quantized when the file is run")
            continue
        if not graph.is_weight(weight):
            continue
        assert maker is not None
        stored = graph.constants[maker.input[0]]
        axis = next((one.i for one in maker.attribute if one.name == "axis"), 1) % stored.ndim
        transposed = any(one.name == "transB" and one.i for one in node.attribute)
        wanted = 0 if node.op_type == "Conv" or transposed else 1
        if graph.constants[maker.input[1]].shape != (stored.shape[wanted],) or axis != wanted:
            found.append(f"weight: that of {node.name} has no scale for each output")
        if graph.scale_of(source) is None:
            found.append(f"input: that of {node.name} is on no grid")
        bias = (
            graph.constants.get(node.input[2]) if len(node.input) > 2 else np.zeros(0, np.float32)
        )
        if bias is None or bias.dtype != np.float32:
            found.append(f"bias: that of {node.name} is no float constant")
    return found


def _activations(graph: Graph) -> list[str]:
    """Between a layer and its activation, and between the two steps of one, no grid. (Of sigmoids
    within the network, there are none but those of SiLU.)"""
    found = []
    for node in graph.of_kind(*ACTIVATIONS):
        before = graph.maker.get(node.input[0])
        if graph.scale_of(node.input[0]) is not None and before is not None:
            quantize = graph.maker[before.input[0]]
            layer = graph.maker.get(quantize.input[0])
            if layer is not None and layer.op_type in LAYERS:
                found.append(f"activation: a grid between {layer.name} and {node.name}")
        if node.op_type == "Sigmoid" and graph.scales_behind(node.output[0]) != {None}:
            found.append(f"activation: a grid within the one of {node.name}")
    return found


def _concatenations(graph: Graph) -> list[str]:
    found = []
    for node in graph.of_kind("Concat"):
        if id(node) not in graph.inner or all(name in graph.constants for name in node.input):
            continue
        scales = {graph.scale_of(name) for name in node.input}
        scales |= graph.scales_behind(node.output[0])
        if scales != {None} and (len(scales) > 1):
            found.append(f"concat: {node.name} has the scales {sorted(map(str, scales))}")
        if scales == {None}:
            found.append(f"concat: {node.name} is on no grid")
    return found


def _keeping(graph: Graph) -> list[str]:
    found = []
    for node in graph.of_kind(*KEEPING):
        scales = {graph.scale_of(node.input[0]), *graph.scales_behind(node.output[0])}
        if id(node) in graph.inner and (len(scales) > 1 or scales == {None}):
            found.append(f"keeping: {node.name} has the scales {sorted(map(str, scales))}")
    return found


def _sums(graph: Graph) -> list[str]:
    """One operand comes from a layer, or its activation, at once; the other one from a grid."""
    found = []
    for node in graph.of_kind("Add"):
        dynamic = [name for name in node.input if name not in graph.constants]
        if id(node) not in graph.inner or len(dynamic) < 2 or graph.is_weight(dynamic[0]):
            continue
        free = [name for name in dynamic if graph.scale_of(name) is None]
        if len(free) != 1:
            found.append(f"sum: {len(dynamic) - len(free)} operands of {node.name} are on grids")
        elif len(graph.readers[free[0]]) > 1:
            found.append(f"sum: what {node.name} adds to is read by others, and on no grid")
    return found

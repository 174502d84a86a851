"""An ONNX file without the grids of its activations, and what those grids were."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .dependencies import require
from .ranges import GridObserver

_MOVING = {"Transpose", "Reshape", "QuantizeLinear", "DequantizeLinear", "Identity", "Cast"}


def without_grids(path: Path) -> tuple[Any, dict[str, list[GridObserver]]] | None:
    """The file with its activations left in float, in onnxruntime.

    So each grid is judged by what the network has there, and not by what other grids left of it.

    Returns:
        The session, and by tensor of it the grids that are on it in the file; None where there are
        none (integer operations in place of Q/DQ, or a float file).
    """
    onnx, ort = require("onnx", "Diagnosis"), require("onnxruntime", "Diagnosis")
    numpy_helper = require("onnx.numpy_helper", "Diagnosis")
    model = onnx.load(str(path))
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    quantizers = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "QuantizeLinear"
        and node.input[0] not in constants
        and all(name in constants for name in node.input[1:] if name)
    }
    instead = {
        node.output[0]: quantizers[node.input[0]].input[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantizers
    }
    makers = {name: node for node in graph.node for name in node.output}

    def origin(name: str) -> str:
        while name in instead:
            name = instead[name]
        return name

    branches = _branches(graph)
    consumers = _consumers(graph)
    observers: dict[str, list[GridObserver]] = {}
    relus: list[tuple[Any, str]] = []
    for node in quantizers.values():
        scale = numpy_helper.to_array(constants[node.input[1]]).astype(np.float64)
        if scale.size != 1:
            continue
        step, zero, kind = float(scale.ravel()[0]), 0.0, np.dtype(np.uint8)
        if len(node.input) > 2 and node.input[2]:
            point = numpy_helper.to_array(constants[node.input[2]])
            zero, kind = float(point.ravel()[0]), point.dtype
        limits = np.iinfo(kind)
        low, high = step * (limits.min - zero), step * (limits.max - zero)
        tensor = origin(node.input[0])
        if low == 0 and consumers.get(node.output[0], {""}) == {"DequantizeLinear"}:
            # The grid is the ReLU as well, and what comes next has to have one.
            relus.append((node, node.input[0]))
        if any(
            (observer.low, observer.high) == (low, high) for observer in observers.get(tensor, [])
        ):
            continue
        branch = branches.get(node.input[0])
        observers.setdefault(tensor, []).append(
            GridObserver(node.input[0], low, high, step or 1e-30, branch)
        )
    if not observers:
        return None
    # They say of integers that they are integers.
    del graph.value_info[:]
    for node, source in relus:
        node.op_type = "Relu"
        del node.input[:], node.attribute[:]
        node.input.append(source)
        for idle in [makers[out] for out in instead if makers[out].input[0] == node.output[0]]:
            instead[idle.output[0]] = node.output[0]
            # It takes no floats.
            graph.node.remove(idle)
    outputs = {output.name for output in graph.output}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] in instead:
            continue
        for index, name in enumerate(node.input):
            node.input[index] = origin(name)
    for name in outputs & set(instead):
        _rename(graph, name, onnx.helper.make_node("Identity", [origin(name)], [name]))
    wanted = [name for name in observers if name not in outputs]
    inputs = {entry.name for entry in graph.input}
    for name in wanted:
        if name in inputs:
            # An input cannot be an output too.
            copied = f"{name}/seen"
            graph.node.append(onnx.helper.make_node("Identity", [name], [copied]))
            observers[copied] = observers.pop(name)
            name = copied
        graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.onnx"
        onnx.save(model, str(target))
        session = ort.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
    return session, observers


def _consumers(graph: Any) -> dict[str, set[str]]:
    """By tensor the kinds of operations that take it; "" for an output of the graph."""
    consumers: dict[str, set[str]] = {output.name: {""} for output in graph.output}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, set()).add(node.op_type)
    return consumers


def _rename(graph: Any, name: str, identity: Any) -> None:
    """Let an identity give an output in place of the node that gave it."""
    for node in graph.node:
        for index, output in enumerate(node.output):
            if output == name:
                node.output[index] = f"{name}/on its grid"
    graph.node.append(identity)


def _branches(graph: Any) -> dict[str, str]:
    """Which tensors lead to the boxes alone, and which to the scores alone.

    Boxes and scores are outputs of these names, or what the last concatenation puts together.
    """
    makers = {name: node for node in graph.node for name in node.output}
    outputs = [output.name for output in graph.output]
    by_kind: dict[str, list[str]] = {"boxes": [], "scores": []}
    for name in outputs:
        kind = next((k for k in by_kind if k[:-1].removesuffix("e") in name.lower()), None)
        if kind is not None:
            by_kind[kind].append(name)
    if not all(by_kind.values()):
        name = outputs[0] if outputs else ""
        while (maker := makers.get(name)) is not None and maker.op_type in _MOVING:
            name = maker.input[0]
        if maker is None or maker.op_type != "Concat" or len(maker.input) < 2:
            return {}
        by_kind = {"boxes": [maker.input[0]], "scores": list(maker.input[1:])}
    above = {kind: _ancestors(names, makers) for kind, names in by_kind.items()}
    only = dict.fromkeys(above["boxes"] - above["scores"], "boxes")
    return only | dict.fromkeys(above["scores"] - above["boxes"], "scores")


def _ancestors(names: list[str], makers: dict[str, Any]) -> set[str]:
    ancestors, pending = set(names), list(names)
    while pending:
        maker = makers.get(pending.pop())
        for name in maker.input if maker is not None else ():
            if name not in ancestors:
                ancestors.add(name)
                pending.append(name)
    return ancestors

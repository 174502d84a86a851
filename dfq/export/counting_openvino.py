"""Integer operations of OpenVINO's own executable graph."""

from __future__ import annotations

import math
from typing import Any

from .counting import IntegerShare, Operation
from .dependencies import compile_openvino, require
from .opening import OpenVinoFile

_LAYERS = {"Convolution", "Deconvolution", "MatMul", "FullyConnected"}
_INTEGER = {"u8", "i8"}


def count_openvino(file: OpenVinoFile) -> IntegerShare:
    """What OpenVINO's CPU plugin executes, with the precision that it says of each operation."""
    core = require("openvino", "Counting").Core()
    model = core.read_model(str(file.path))
    model.reshape(list(file.image.shape))
    compiled = compile_openvino(core, model)
    layers = []
    for operation in compiled.get_runtime_model().get_ordered_ops():
        info = _info(operation)
        if info["layerType"] not in _LAYERS:
            continue
        data, weight = (list(value.get_shape()) for value in operation.input_values()[:2])
        out = list(operation.output(0).get_shape())
        if info["layerType"] == "Deconvolution":
            macs = math.prod(data) * math.prod(weight) // data[1]
        elif info["layerType"] == "Convolution":
            macs = math.prod(out) * math.prod(weight) // out[1]
        else:
            # Either side may be transposed.
            macs = math.prod(data) * out[-1]
        integers = info.get("runtimePrecision") in _INTEGER
        reason = None if integers else _reason(operation, info)
        kind = f"{info['layerType']} ({info.get('primitiveType', '?')})"
        name = str(operation.get_friendly_name())
        layers.append(Operation(name, kind, macs // out[0], integers, reason))
    return IntegerShare(tuple(layers), "OpenVINO's executable graph (runtimePrecision)")


def _info(operation: Any) -> dict[str, str]:
    rt_info = operation.get_rt_info()
    return {key: str(getattr(rt_info[key], "value", rt_info[key])) for key in rt_info}


def _reason(operation: Any, info: dict[str, str]) -> str:
    precision = info.get("runtimePrecision", "?")
    sources = [_info(value.get_node()) for value in operation.input_values()[:2]]
    precisions = [source.get("outputPrecisions", "?").split(",")[0] for source in sources]
    if precisions[0] not in _INTEGER and precisions[1] not in _INTEGER:
        return f"in {precision}: neither its input nor its weight comes as 8-bit integers"
    operand = "input" if precisions[0] not in _INTEGER else "weight"
    comes = precisions[0] if operand == "input" else precisions[1]
    return f"in {precision}: its {operand} comes as {comes} and not as 8-bit integers"

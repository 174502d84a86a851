"""Integer operations of a LiteRT file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .counting import IntegerShare, Operation
from .opening import LiteRtFile

_LAYERS = {"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL"}
_INTEGER = {np.int8, np.uint8}


def count_litert(file: LiteRtFile) -> IntegerShare:
    """What a LiteRT file computes: operations carry the types of what they read and write, and
    XNNPACK takes over whole stretches of them."""
    interpreter = file.interpreter
    operations = interpreter._get_ops_details()
    delegated = any(operation["op_name"] == "DELEGATE" for operation in operations)
    layers = []
    for operation in operations:
        if operation["op_name"] not in _LAYERS:
            continue
        # The first of a transposed convolution's inputs is the shape of its output.
        inputs = list(operation["inputs"])
        data, weight = (
            inputs[:2] if operation["op_name"] != "TRANSPOSE_CONV" else (inputs[2], inputs[1])
        )
        shapes = [_tensor(interpreter, index)["shape"] for index in (data, weight)]
        kinds = [_tensor(interpreter, index)["dtype"] for index in (data, weight)]
        target = _tensor(interpreter, operation["outputs"][0])
        macs = _macs(operation["op_name"], shapes[0], shapes[1], target["shape"])
        integers = all(kind in _INTEGER for kind in kinds)
        reason = None
        if not integers:
            kind_names = [np.dtype(kind).name for kind in kinds]
            reason = f"its input is {kind_names[0]} and its weight {kind_names[1]}"
            if kind_names[0] == "float32" and kinds[1] in _INTEGER:
                reason = "its input is on no grid"
        layers.append(Operation(target["name"], operation["op_name"], macs, integers, reason))
    by = ", executed by XNNPACK" if delegated else ", executed by LiteRT's own kernels"
    return IntegerShare(tuple(layers), f"types of the file's operations{by}")


def _tensor(interpreter: Any, index: int) -> dict[str, Any]:
    details: dict[str, Any] = interpreter._get_tensor_details(int(index), 0)
    return details


def _macs(kind: str, data: Any, weight: Any, out: Any) -> int:
    total = math.prod(int(side) for side in out)
    if kind == "CONV_2D":
        return total * math.prod(int(side) for side in weight[1:])
    if kind == "DEPTHWISE_CONV_2D":
        return total * math.prod(int(side) for side in weight[1:3])
    if kind == "TRANSPOSE_CONV":
        return math.prod(int(s) for s in data) * math.prod(int(s) for s in weight[:3])
    return total * int(data[-1])

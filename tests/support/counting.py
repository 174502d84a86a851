"""What runtimes make of a file: the operations of their own optimised graphs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

Operations = Counter[tuple[str, str]]
"""(operation, type of its first input or of what it computes in) -> how many there are."""

WEIGHTED = {
    "onnx": {"Conv", "FusedConv", "Gemm", "ConvTranspose", "MatMulNBits", "QLinearConv", "QGemm"},
    "xml": {"Convolution", "FullyConnected", "Deconvolution"},
    "tflite": {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"},
}
"""Operations that layers of weights become; LiteRT's with a bias alone, as products are among them
as well."""


def operations(path: Path) -> Operations:
    """The operations that the runtime of a file executes."""
    kind = {".onnx": _onnx, ".xml": _openvino, ".tflite": _litert}[path.suffix]
    return kind(path)


def layers(path: Path) -> tuple[int, int]:
    """How many layers of weights a runtime computes in integers of 8 bits, and how many not."""
    found = operations(path)
    wanted = WEIGHTED[path.suffix[1:]]
    whole = sum(count for (name, kind), count in found.items() if name in wanted and kind == "int8")
    return whole, sum(count for (name, _), count in found.items() if name in wanted) - whole


def _onnx(path: Path) -> Operations:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    optimised = path.with_suffix(".optimised")
    options.optimized_model_filepath = str(optimised)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    integers = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger")
    names = [node.op_type for node in onnx.load(optimised).graph.node]
    return Counter((name, "int8" if name.startswith(integers) else "float") for name in names)


def _openvino(path: Path) -> Operations:
    from dfq.export.opening import OpenVinoFile

    found: Operations = Counter()
    for operation in OpenVinoFile(path, 1).compiled.get_runtime_model().get_ops():
        says = operation.get_rt_info()
        precision = str(says["runtimePrecision"].value)
        kind = "int8" if precision in ("u8", "i8") else "float"
        found[str(says["layerType"].value), kind] += 1
    return found


def _litert(path: Path) -> Operations:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if name[0] != "_"}
    found: Operations = Counter()
    graph = model.subgraphs[0]
    for operation in graph.operators:
        code = model.operatorCodes[operation.opcodeIndex]
        name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        kinds = [graph.tensors[index].type for index in operation.inputs if index >= 0]
        if name == "FULLY_CONNECTED" and len(kinds) < 3:
            name = "PRODUCT"
        whole = schema.TensorType.INT8 in kinds[:2]
        found[name, "int8" if whole else "float"] += 1
    return found

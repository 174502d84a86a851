"""Lower a program to a file, by the converter of its format."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, shown
from ..plain import one_line
from .dependencies import require
from .exported import ExportInfo
from .program import Program

KEY = "dfq"
"""Under which a file holds what it says of itself."""

OPSET = 20
OPSET_INT4 = 21
"""The first one that has 4-bit integers."""


def write(program: Program, info: ExportInfo, path: Path, *, int4: bool = False) -> list[Path]:
    """Write a program in the format of `info`.

    Args:
        program: to be lowered.
        info: what the file is to say of itself.
        path: of the file; replaced whole, or not at all.
        int4: ONNX alone: weights of 4 bits and fewer as true INT4.

    Returns:
        The files written: OpenVINO has two.

    Raises:
        UserError: the converter is not installed, or cannot convert the network.
    """
    writer = _WRITERS[info.format]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        try:
            made = writer(program, info, Path(folder) / path.name, int4)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{shown(path)}: {info.format} has no way to write this network "
                f"({type(error).__name__}: {one_line(error)[:300]})"
            ) from error
        written = []
        for file in made:
            shutil.move(file, path.parent / file.name)
            written.append(path.parent / file.name)
    return written


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Converters report their progress to whoever listens."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _to_onnx(program: Program, *, opset: int) -> Any:
    """An `onnx.ModelProto`."""
    require("onnx", "ONNX")
    require("onnxscript", "ONNX")
    with _quietly():
        made = torch.onnx.export(
            program.exported,
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=list(program.outputs),
            verbose=False,
            external_data=False,
        )
    assert made is not None
    return made.model_proto


def _write_onnx(program: Program, info: ExportInfo, path: Path, int4: bool) -> list[Path]:
    model = _to_onnx(program, opset=OPSET_INT4 if int4 else OPSET)
    if int4:
        _pack_int4(model)
    # Names of this machine's folders and of this package's functions are nobody's business.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    model.producer_name = KEY
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, info.model_dump_json()
    path.write_bytes(model.SerializeToString())
    return [path]


def _pack_int4(model: Any) -> None:
    """Store int8 weights that all fit into 4 bits as INT4."""
    onnx = require("onnx", "ONNX")
    numpy_helper, helper = require("onnx.numpy_helper", "ONNX"), require("onnx.helper", "ONNX")
    weights = {
        node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"
    }
    zeros = {node.input[2] for node in weights.values() if len(node.input) > 2}
    for tensor in model.graph.initializer:
        if tensor.name not in weights or tensor.data_type != onnx.TensorProto.INT8:
            continue
        values = numpy_helper.to_array(tensor)
        if values.min() < -8 or values.max() > 7:
            continue
        node = weights[tensor.name]
        # Its zero point, all zeros, would have to be of the same type.
        if len(node.input) > 2:
            assert node.input[2] in zeros
            del node.input[2:]
        packed = helper.make_tensor(
            tensor.name, onnx.TensorProto.INT4, values.shape, values.flatten().tolist()
        )
        tensor.CopyFrom(packed)


def _write_openvino(program: Program, info: ExportInfo, path: Path, int4: bool) -> list[Path]:
    openvino = require("openvino", "OpenVINO")
    onnx_model = _to_onnx(program, opset=OPSET)
    with tempfile.TemporaryDirectory() as folder, _quietly():
        source = Path(folder) / "model.onnx"
        source.write_bytes(onnx_model.SerializeToString())
        model = openvino.convert_model(str(source))
    model.set_rt_info(info.model_dump_json(), KEY)
    openvino.save_model(model, str(path), compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def _write_litert(program: Program, info: ExportInfo, path: Path, int4: bool) -> list[Path]:
    # Its converter announces itself at length otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    litert = require("litert_torch", "LiteRT")
    config = require("litert_torch.quantize.quant_config", "LiteRT")
    quantizer = require("litert_torch.quantize.pt2e_quantizer", "LiteRT")
    # Any quantizer makes the converter read Q/DQ strictly; there is nothing left for it to do.
    strict = quantizer.PT2EQuantizer().set_global(quantizer.get_symmetric_quantization_config())
    example = torch.zeros(1, 3, program.image_size, program.image_size)
    options = {"quant_config": config.QuantConfig(pt2e_quantizer=strict)}
    with _quietly(), _native_quietly():
        made = litert.convert(
            program.module(), (example,), **(options if info.weight_bits < 32 else {})
        )
        made.export(str(path))
    path.write_bytes(_with_metadata(path.read_bytes(), info))
    return [path]


def _with_metadata(data: bytes, info: ExportInfo) -> bytes:
    """A LiteRT file with one more entry among its metadata."""
    schema = require("ai_edge_litert.schema_py_generated", "LiteRT")
    flatbuffers = require("flatbuffers", "LiteRT")
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = list(info.model_dump_json().encode())
    model.buffers.append(buffer)
    entry.name, entry.buffer = KEY.encode(), len(model.buffers) - 1
    model.metadata = [*(model.metadata or []), entry]
    # Names of outputs, which the converter numbers.
    graph = model.subgraphs[0]
    graph.tensors[graph.inputs[0]].name = b"images"
    for index, name in zip(graph.outputs, info.outputs, strict=True):
        graph.tensors[index].name = name.encode()
    builder = flatbuffers.Builder(len(data))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


@contextlib.contextmanager
def _native_quietly() -> Iterator[None]:
    """Within this context native code says nothing on standard error."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _write_torch(program: Program, info: ExportInfo, path: Path, int4: bool) -> list[Path]:
    with _quietly():
        torch.export.save(
            program.exported, path, extra_files={f"{KEY}.json": info.model_dump_json()}
        )
    return [path]


_WRITERS: dict[str, Callable[[Program, ExportInfo, Path, bool], list[Path]]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "litert": _write_litert,
    "torch": _write_torch,
}

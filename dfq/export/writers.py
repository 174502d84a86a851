"""Lower a program to a file, by the converter of its format."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError, shown
from ..runtime.plain import one_line
from ..runtime.unfinished import unfinished_folder
from .dependencies import require
from .exported import ExportInfo
from .factors import require_addable
from .passes import has_wide_grids
from .program import Program
from .suppression import append_nms

KEY = "dfq"
"""Under which a file holds what it says of itself."""

OPSET, OPSET_MORE = 20, 21
"""The second is the first one that has integers of 4 bits, and of 16 in a quantize."""


def path_of_part(path: Path, part: str) -> Path:
    """Where a part of a file's detector is: `FILE.heads.onnx` of `FILE.onnx`."""
    return path.with_name(f"{path.stem}.{part}{path.suffix}")


def write(
    program: Program,
    info: ExportInfo,
    path: Path,
    *,
    int4: bool = False,
    parts: Mapping[str, Program] | None = None,
) -> list[Path]:
    """Write a program in the format of `info`.

    Args:
        program: to be lowered.
        info: what the file is to say of itself.
        path: of the file; replaced whole, or not at all.
        int4: ONNX alone: weights of 4 bits and fewer as true INT4.
        parts: of the detector, by name; each becomes a file of its own beside it.

    Returns:
        The files written, the one named first: OpenVINO has two each.

    Raises:
        UserError: the converter is not installed, or cannot convert the network.
    """
    writer = _WRITERS[info.format]
    with unfinished_folder(path.parent, path.name) as folder:
        target = folder / path.name
        info = info.model_copy(update={"parts": list(parts or ())})
        try:
            files = writer(program, info, target, int4)
            for name, part in (parts or {}).items():
                changes = {"part": name, "parts": [], "outputs": dict.fromkeys(part.outputs, name)}
                of_part = info.model_copy(update=changes)
                files += writer(part, of_part, path_of_part(target, name), int4)
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(
                f"{shown(path)}: {info.format} has no way to write this network "
                f"({type(error).__name__}: {one_line(error)[:300]})"
            ) from error
        if len(files) > 1:
            # Never beside parts that it is not of, not even where this process is killed here.
            path.unlink(missing_ok=True)
        for file in reversed(files):
            file.replace(path.parent / file.name)
    return [path.parent / file.name for file in files]


def files_of(path: Path, format: str, parts: Iterable[str] = ()) -> list[Path]:
    """The files that `write` makes of a detector.

    Args:
        path: the file.
        format: that is written.
        parts: names of the detector's parts.
    """
    files = [path, *(path_of_part(path, name) for name in parts)]
    if format != "openvino":
        return files
    return [place for file in files for place in (file, file.with_suffix(".bin"))]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Turns off the converters' own progress output within the context."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _to_onnx(program: Program, *, int4: bool = False) -> Any:
    """An `onnx.ModelProto`."""
    opset = OPSET_MORE if int4 or has_wide_grids(program.exported.graph) else OPSET
    require("onnx", "ONNX")
    require("onnxscript", "ONNX")
    with _quietly():
        onnx_program = torch.onnx.export(
            program.exported,
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=list(program.outputs),
            verbose=False,
            external_data=False,
        )
    assert onnx_program is not None
    return onnx_program.model_proto


def _write_onnx(program: Program, info: ExportInfo, path: Path, int4: bool) -> list[Path]:
    model = _to_onnx(program, int4=int4)
    if int4:
        _pack_int4(model)
    elif info.runtime == "openvino":
        _drop_zero_points(model)
    if info.nms is not None:
        append_nms(model, info.nms)
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


def _drop_zero_points(model: Any) -> None:
    """Leave out zero points of weights, which are all zeros: with them, OpenVINO takes convolutions
    in front of linear layers for float ones with compressed weights."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            del node.input[2:]


def _pack_int4(model: Any) -> None:
    """Store int8 weights that all fit into 4 bits as INT4, or as UINT4 where each channel has its
    own zero point."""
    onnx = require("onnx", "ONNX")
    numpy_helper, helper = require("onnx.numpy_helper", "ONNX"), require("onnx.helper", "ONNX")
    weights = {
        node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"
    }
    for tensor in list(model.graph.initializer):
        if tensor.name not in weights or tensor.data_type != onnx.TensorProto.INT8:
            continue
        node, values = weights[tensor.name], numpy_helper.to_array(tensor).astype(int)
        if values.ndim < 2:
            continue
        channel = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        other_axes = tuple(axis for axis in range(values.ndim) if axis != channel)
        least = values.min(axis=other_axes, keepdims=True).clip(max=0)
        # Its zero point, all zeros, would have to be of the same type.
        del node.input[2:]
        if values.min() >= -8 and values.max() <= 7:
            kind = onnx.TensorProto.INT4
        elif (values - least).max() <= 15:
            kind = onnx.TensorProto.UINT4
            zero = helper.make_tensor(
                f"{tensor.name}.zero", kind, [least.size], _in_pairs(-least), raw=True
            )
            model.graph.initializer.append(zero)
            node.input.append(zero.name)
            values = values - least
        else:
            continue
        tensor.CopyFrom(
            helper.make_tensor(tensor.name, kind, values.shape, _in_pairs(values), raw=True)
        )


def _in_pairs(values: Any) -> bytes:
    """Integers of 4 bits, two a byte, the first one in the lower half."""
    flat = values.flatten() & 15
    flat = np.append(flat, np.zeros(flat.size % 2, flat.dtype)).reshape(-1, 2)
    return bytes((flat[:, 0] | flat[:, 1] << 4).astype(np.uint8))


def _write_openvino(program: Program, info: ExportInfo, path: Path, int4: bool) -> list[Path]:
    openvino = require("openvino", "OpenVINO")
    onnx_model = _to_onnx(program)
    _drop_zero_points(onnx_model)
    if info.nms is not None:
        append_nms(onnx_model, info.nms)
    data = onnx_model.SerializeToString()
    source = path.with_name("model.onnx")
    source.write_bytes(data)
    with _quietly():
        model = openvino.convert_model(str(source))
    source.unlink()
    model.set_rt_info(info.model_dump_json(), KEY)
    try:
        openvino.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError:
        # Which does not say why it could not write; what cannot be written here says it.
        path.with_suffix(".room").write_bytes(bytes(2 * len(data)))
        raise
    return [path, path.with_suffix(".bin")]


def _write_litert(program: Program, info: ExportInfo, path: Path, int4: bool) -> list[Path]:
    # Its converter announces itself at length otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    litert = require("litert_torch", "LiteRT")
    config = require("litert_torch.quantize.quant_config", "LiteRT")
    quantizer = require("litert_torch.quantize.pt2e_quantizer", "LiteRT")
    # Any quantizer makes the converter read Q/DQ strictly; there is nothing left for it to do.
    strict = quantizer.PT2EQuantizer().set_global(quantizer.get_symmetric_quantization_config())
    require_addable(program.exported.graph)
    example = torch.zeros(1, *program.shape)
    options = {"quant_config": config.QuantConfig(pt2e_quantizer=strict)}
    with _quietly(), _native_quietly():
        edge_model = litert.convert(
            program.module(), (example,), **(options if info.weight_bits < 32 else {})
        )
        # Nor is it told to write the file: where the disk is full, that ends the process.
        data = edge_model.model_content()
    path.write_bytes(_with_metadata(data, info))
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
    # Not to the file itself: where the disk is full, PyTorch ends the process.
    buffer = io.BytesIO()
    with _quietly():
        torch.export.save(
            program.exported, buffer, extra_files={f"{KEY}.json": info.model_dump_json()}
        )
    path.write_bytes(buffer.getbuffer())
    return [path]


_WRITERS: dict[str, Callable[[Program, ExportInfo, Path, bool], list[Path]]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "litert": _write_litert,
    "torch": _write_torch,
}

"""The quantizers that come with runtimes, and what their benchmarks share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import nncf
import onnx
import openvino
from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

from dfq.data.calibration_set import CalibrationSet
from dfq.data.image_set import ImageSet
from dfq.data.readers import open_set
from dfq.export.calibration_plugins import nncf_dataset, onnxruntime_reader

INPUT = "images"

Images = CalibrationSet | ImageSet


def by_onnxruntime(
    model: Path, data: Images, size: int, out: Path, leave: Sequence[str] = ()
) -> Path:
    """`quantize_static` with a scale a channel and the unsigned activations that CPUs want; nodes
    named in `leave` stay in float."""
    path, reader = out.with_suffix(".onnx"), onnxruntime_reader(data, INPUT, size)
    quantize_static(
        model,
        path,
        reader,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        nodes_to_exclude=list(leave),
    )
    return path


def by_onnxruntime_dynamic(model: Path, out: Path, leave: Sequence[str] = ()) -> Path:
    """`quantize_dynamic`; of weights its kernels for convolutions take unsigned ones alone."""
    path = out.with_suffix(".onnx")
    quantize_dynamic(model, path, weight_type=QuantType.QUInt8, nodes_to_exclude=list(leave))
    return path


def by_nncf(model: Path, data: Images, size: int, out: Path, leave: Sequence[str] = ()) -> Path:
    """`nncf.quantize` as it comes, on all images; nodes named in `leave` stay in float."""
    path, images = out.with_suffix(".xml"), nncf_dataset(data, size)
    read = openvino.Core().read_model(model)
    scope = nncf.IgnoredScope(names=list(leave)) if leave else None
    count = images.get_length()
    # Its progress is no part of the tables.
    with contextlib.redirect_stdout(sys.stderr):
        quantized = nncf.quantize(read, images, subset_size=count, ignored_scope=scope)
    openvino.save_model(quantized, path, compress_to_fp16=False)
    return path


def decoding_of_onnx(path: Path) -> list[str]:
    """Names of the nodes that no convolution comes after: they turn predictions into boxes."""
    nodes = list(onnx.load(path, load_external_data=False).graph.node)
    needed: set[str] = set()
    found = []
    for node in reversed(nodes):
        if node.op_type == "Conv" or needed.intersection(node.output):
            needed.update(node.input)
        else:
            found.append(node.name)
    return found[::-1]


def decoding_of_openvino(path: Path) -> list[str]:
    """The same of an OpenVINO IR; constants belong to those that take them."""
    needed: set[str] = set()
    found = []
    for node in reversed(openvino.Core().read_model(path).get_ordered_ops()):
        name, kind = node.get_friendly_name(), node.get_type_name()
        if kind in ("Convolution", "GroupConvolution") or name in needed:
            needed.update(
                value.get_source_output().get_node().get_friendly_name() for value in node.inputs()
            )
        elif kind not in ("Constant", "Result", "Parameter"):
            found.append(name)
    return found[::-1]


def bytes_of(path: Path) -> int:
    """Of a file and of what OpenVINO keeps beside it."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


def images_of(source: str, first: int | None) -> Images:
    """A calibration set, or so many of real images; all of them where `first` is None."""
    folder = Path(source)
    if folder.is_dir() and CalibrationSet.is_one(folder):
        return CalibrationSet.open(folder)
    found = open_set(source)
    return found if first is None else found.subset(first)

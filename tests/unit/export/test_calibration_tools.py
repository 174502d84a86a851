"""The tools themselves calibrate on a set of ours: the range that they find for a network's input
is what follows from all images of the set, each once, in order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.calibration_sets_made import BRIGHTEST, COUNT, SIDE, make_set
from torch import nn

from dfq.export import calibration_plugins as plugins
from dfq.export.calibration_files import export_for

# Files of the runtimes, which take their time.
pytestmark = pytest.mark.e2e

LARGEST = pytest.approx(max(BRIGHTEST) / 255, rel=0.005)
"""What onnxruntime takes for the largest input: that of all images."""

MEAN = pytest.approx(float(np.mean(BRIGHTEST)) / 255, rel=0.005)
"""What NNCF takes: the mean of the images' largest."""


def averaged() -> float:
    """What ai-edge-quantizer takes: a moving average of the images' largest, in their order."""
    value = BRIGHTEST[0] / 255
    for brightest in BRIGHTEST[1:]:
        value = 0.95 * value + 0.05 * brightest / 255
    return value


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("made") / "set").root


class Network(nn.Module):
    """Two convolutions and a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.silu(self.first(images))).sigmoid()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def onnx_file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    program = torch.onnx.export(
        network, (torch.rand(1, 3, SIDE, SIDE),), dynamo=True, input_names=["pixels"], verbose=False
    )
    assert program is not None
    program.save(path)
    return path


def calibrate(tool: str, made: Path, folder: Path, model: Path, result: str) -> Path:
    """Quantize by the script that belongs to a tool's files."""
    export_for(tool, made, folder / "files")
    out = folder / result
    subprocess.run([sys.executable, folder / "files/calibrate.py", model, out], check=True)
    return out


def onnx_range(path: Path) -> float:
    """The largest input that the quantizer on an ONNX graph's input can hold."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    values = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    images = model.graph.input[0].name
    (first,) = (node for node in model.graph.node if images in node.input)
    assert first.op_type == "QuantizeLinear"
    scale, zero = values[first.input[1]], values[first.input[2]]
    return float(scale) * (np.iinfo(zero.dtype).max - int(zero))


def openvino_range(model: Any) -> float:
    """The same of an OpenVINO model's first FakeQuantize."""
    (entry,) = model.inputs
    (first,) = (target.get_node() for target in entry.get_target_inputs())
    assert first.get_type_name() == "FakeQuantize"
    return float(first.input_value(2).get_node().get_data().max())


def litert_range(path: Path) -> float:
    """The same of a LiteRT file's input."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    scale, zero = interpreter.get_input_details()[0]["quantization"]
    if scale == 0:
        # The file takes floats, and quantizes them itself.
        (scale, zero) = next(
            entry["quantization"]
            for entry in interpreter.get_tensor_details()
            if entry["dtype"] == np.int8 and list(entry["shape"]) == [1, 3, SIDE, SIDE]
        )
    return float(scale) * (127 - zero)


def test_onnxruntime(made: Path, onnx_file: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_static

    reader = plugins.onnxruntime_reader(made, "pixels")
    quantize_static(onnx_file, tmp_path / "int8.onnx", reader)
    assert onnx_range(tmp_path / "int8.onnx") == LARGEST


def test_onnxruntime_in_parts(made: Path, onnx_file: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_static

    reader = plugins.onnxruntime_reader(made, "pixels")
    parts = {"CalibStridedMinMax": 2}
    quantize_static(onnx_file, tmp_path / "int8.onnx", reader, extra_options=parts)
    assert onnx_range(tmp_path / "int8.onnx") == LARGEST


def test_onnxruntime_by_the_script(made: Path, onnx_file: Path, tmp_path: Path) -> None:
    import onnx

    out = calibrate("onnxruntime", made, tmp_path, onnx_file, "int8.onnx")
    assert onnx_range(out) == LARGEST
    # What follows the last layer stays float: boxes and scores on one grid lose the scores.
    graph = onnx.load(out).graph
    assert graph.output[0].name in [
        name for node in graph.node if node.op_type == "Sigmoid" for name in node.output
    ]


def test_nncf_on_an_openvino_model(made: Path, onnx_file: Path) -> None:
    import nncf
    import openvino

    images = plugins.nncf_dataset(made)
    assert images.get_length() == COUNT
    quantized = nncf.quantize(openvino.Core().read_model(onnx_file), images, subset_size=COUNT)
    assert openvino_range(quantized) == MEAN


def test_nncf_on_a_pytorch_model(made: Path, network: nn.Module) -> None:
    import nncf

    images = plugins.nncf_dataset(made, tensors=True)
    quantized = nncf.quantize(network, images, subset_size=COUNT)
    (found,) = (
        module.scale
        for name, module in quantized.named_modules()
        if hasattr(module, "scale") and ".images" in name
    )
    assert found.item() == MEAN


@pytest.mark.parametrize("tool", ["openvino", "nncf"])
def test_nncf_by_the_scripts(made: Path, onnx_file: Path, tmp_path: Path, tool: str) -> None:
    import openvino

    if tool == "nncf":
        assert onnx_range(calibrate(tool, made, tmp_path, onnx_file, "int8.onnx")) == MEAN
        return
    out = calibrate(tool, made, tmp_path, onnx_file, "int8.xml")
    assert openvino_range(openvino.Core().read_model(out)) == MEAN


def test_ai_edge_quantizer(made: Path, network: nn.Module, tmp_path: Path) -> None:
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    model = tmp_path / "model.tflite"
    litert_torch.convert(network, (torch.rand(1, 3, SIDE, SIDE),)).export(str(model))
    tool = quantizer.Quantizer(str(model))
    tool.load_quantization_recipe(recipe.static_wi8_ai8())
    ranges = tool.calibrate(plugins.ai_edge_quantizer_data(made))
    tool.quantize(ranges).export_model(str(tmp_path / "int8.tflite"))
    assert litert_range(tmp_path / "int8.tflite") == pytest.approx(averaged(), rel=0.005)
    by_script = calibrate("ai-edge-quantizer", made, tmp_path, model, "by-script.tflite")
    assert by_script.read_bytes() == (tmp_path / "int8.tflite").read_bytes()


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_ultralytics_exports_on_it(made: Path, tmp_path: Path, runtime: str) -> None:
    """The command that `dfq data export --for ultralytics` says, on a network of random weights."""
    _, count, command = export_for("ultralytics", made, tmp_path / "a set")
    assert count == COUNT
    words = {
        "YOLO_OFFLINE": "1",
        "YOLO_VERBOSE": "True",
        # What is missing is said and not installed.
        "YOLO_AUTOINSTALL": "false",
        "YOLO_CONFIG_DIR": str(tmp_path / "config"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = command.replace("MODEL.pt", "yolo11n.yaml").replace("onnx", runtime)
    result = subprocess.run(
        command + (" simplify=False" if runtime == "onnx" else ""),
        shell=True,
        cwd=tmp_path,
        env={**os.environ, **words},
        capture_output=True,
        text=True,
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert f"calibration dataset has only {COUNT} images" in said or f"found {COUNT} images" in said
    assert "corrupt" not in said.replace("0 corrupt", "")
    if runtime == "onnx":
        assert onnx_range(tmp_path / "yolo11n_int8.onnx") == LARGEST
        return
    import openvino

    model = openvino.Core().read_model(tmp_path / "yolo11n_int8_openvino_model/yolo11n.xml")
    assert openvino_range(model) == MEAN

"""What TensorRT's explicit quantization does not allow is seen in the file, without TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dfq.export.structure import structure_faults


def written(
    path: Path,
    *,
    zero: int = 0,
    kind: type[np.generic] = np.int8,
    scale: Any = 0.1,
    of_weights: bool = True,
    of_inputs: bool = True,
) -> Path:
    """A convolution between grids, as these say."""
    weights = np.ones((2, 3, 1, 1), np.int8)
    constants = {
        "scale": np.asarray(scale, np.float32),
        "zero": np.full(np.shape(scale), zero, kind),
        "weights": weights if of_weights else weights.astype(np.float32),
        "weight_scale": np.ones(2, np.float32),
        "weight_zero": np.zeros(2, np.int8),
    }
    nodes = []
    source, kernel = "images", "weights"
    if of_inputs:
        nodes += [
            helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"], "quantize"),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantize"),
        ]
        source = "d"
    if of_weights:
        names = ["weights", "weight_scale", "weight_zero"]
        nodes.append(helper.make_node("DequantizeLinear", names, ["w"], "weight", axis=0))
        kernel = "w"
    nodes.append(helper.make_node("Conv", [source, kernel], ["out"], "conv"))
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 2, 4, 4])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), path)
    return path


def test_a_file_as_it_should_be(tmp_path: Path) -> None:
    assert structure_faults(written(tmp_path / "a.onnx")) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"zero": 3}, "2 grids have a zero point"),
        ({"kind": np.uint8}, "2 grids are not of int8"),
        ({"scale": [0.1, 0.2, 0.3]}, "2 grids on activations have no single scale"),
        ({"of_weights": False}, "1 layers have a grid on one input alone"),
        ({"of_inputs": False}, "1 layers have a grid on one input alone"),
        ({"of_weights": False, "of_inputs": False}, "no grids"),
    ],
)
def test_what_is_not_allowed_is_named(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    (fault,) = structure_faults(written(tmp_path / "a.onnx", **options))
    assert said in fault
    if "no grids" not in said:
        assert any(name in fault for name in ("quantize", "conv"))

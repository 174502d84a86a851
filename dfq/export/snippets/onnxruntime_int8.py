"""Quantize an ONNX model by onnxruntime: python calibrate.py model.onnx model-int8.onnx"""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

model, out = sys.argv[1:]
images = np.load(Path(__file__).with_name("images.npy"), mmap_mode="r")  # (n, 3, h, w), RGB, uint8
graph = onnx.load(model).graph
constants = {constant.name for constant in graph.initializer}
name = next(entry.name for entry in graph.input if entry.name not in constants)


class Images(CalibrationDataReader):
    remaining = iter(images)

    def get_next(self):
        image = next(self.remaining, None)
        return None if image is None else {name: image[None].astype(np.float32) / 255}


# What follows the layers, boxes and scores in one tensor, stays float: on one grid, scores vanish.
float_nodes = [node.name for node in graph.node if node.op_type not in ("Conv", "Gemm", "MatMul")]
unsigned = {"activation_type": QuantType.QUInt8}  # CPUs are fast with these
quantize_static(model, out, Images(), per_channel=True, nodes_to_exclude=float_nodes, **unsigned)

"""Quantize an ONNX model by NNCF: python calibrate.py model.onnx model-int8.onnx"""

import sys
from pathlib import Path

import nncf
import numpy as np
import onnx

path, out = sys.argv[1:]
model = onnx.load(path)
constants = {constant.name for constant in model.graph.initializer}
name = next(entry.name for entry in model.graph.input if entry.name not in constants)
images = np.load(Path(__file__).with_name("images.npy"), mmap_mode="r")  # (n, 3, h, w), RGB, uint8
dataset = nncf.Dataset(images, lambda image: {name: image[None].astype(np.float32) / 255})
onnx.save(nncf.quantize(model, dataset, subset_size=len(images)), out)

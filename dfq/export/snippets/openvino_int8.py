"""Quantize an OpenVINO model by NNCF: python calibrate.py model.xml model-int8.xml"""

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino

model, out = sys.argv[1:]  # model may be an .onnx file too
images = np.load(Path(__file__).with_name("images.npy"), mmap_mode="r")  # (n, 3, h, w), RGB, uint8
dataset = nncf.Dataset(images, lambda image: image[None].astype(np.float32) / 255)
quantized = nncf.quantize(
    openvino.Core().read_model(model), dataset, subset_size=len(images)
)  # boxes are off? ignored_scope=nncf.IgnoredScope(...) leaves the end of the head in float
openvino.save_model(quantized, out, compress_to_fp16=False)

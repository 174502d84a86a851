"""Quantize an ONNX model for a Rockchip NPU: python calibrate.py model.onnx model.rknn rk3588"""

import os
import sys
from pathlib import Path

from rknn.api import RKNN

model, out, platform = sys.argv[1:]
model, out = os.path.abspath(model), os.path.abspath(out)
os.chdir(Path(__file__).parent)  # dataset.txt names its images from here
rknn = RKNN()
# The network takes RGB in [0, 1], and images are read as RGB in [0, 255].
rknn.config(mean_values=[[0, 0, 0]], std_values=[[255, 255, 255]], target_platform=platform)
if rknn.load_onnx(model=model) or rknn.build(do_quantization=True, dataset="dataset.txt"):
    sys.exit("rknn: the model was not built")
sys.exit(rknn.export_rknn(out))

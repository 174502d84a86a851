"""Quantize a LiteRT model: python calibrate.py model.tflite model-int8.tflite"""

import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe

model, out = sys.argv[1:]
images = np.load(Path(__file__).with_name("images.npy"), mmap_mode="r")  # (n, 3, h, w), RGB, uint8
interpreter = Interpreter(model_path=model)
signature = next(iter(interpreter.get_signature_list()))
name, entry = next(iter(interpreter.get_signature_runner(signature).get_input_details().items()))
if entry["shape"][-1] == 3:  # made from TensorFlow, or by onnx2tf
    images = images.transpose(0, 2, 3, 1)
feeds = [{name: image[None].astype(np.float32) / 255} for image in images]  # is read twice
tool = quantizer.Quantizer(model)
tool.load_quantization_recipe(recipe.static_wi8_ai8())
tool.quantize(tool.calibrate({signature: feeds})).export_model(out)

"""For MCT: from calibrate import representative_data_gen

model, _ = model_compression_toolkit.ptq.pytorch_post_training_quantization(
    network, representative_data_gen)
"""

from pathlib import Path

import numpy as np

images = np.load(Path(__file__).with_name("images.npy"), mmap_mode="r")  # (n, 3, h, w), RGB, uint8


def representative_data_gen():
    for image in images:
        yield [image[None].astype(np.float32) / 255]

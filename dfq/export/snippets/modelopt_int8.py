"""For ModelOpt: from calibrate import forward_loop

modelopt.torch.quantization.quantize(network, INT8_DEFAULT_CFG, forward_loop)

`python calibrate.py` writes calibration.npy (float32), which modelopt.onnx.quantization takes.
"""

from pathlib import Path

import numpy as np
import torch

images = np.load(Path(__file__).with_name("images.npy"), mmap_mode="r")  # (n, 3, h, w), RGB, uint8


def forward_loop(network):
    device = next(network.parameters()).device
    with torch.no_grad():
        for image in images:
            network(torch.from_numpy(image[None].astype(np.float32) / 255).to(device))


if __name__ == "__main__":
    np.save(Path(__file__).with_name("calibration.npy"), images.astype(np.float32) / 255)

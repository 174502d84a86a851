"""Instance masks of detections, as run lengths on the original image."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from ..data.outlines import Segment

THRESHOLD = 0.5
"""What a pixel's value must reach to belong to the object."""


def paste(mask: Tensor, box: Tensor, width: int, height: int) -> np.ndarray:
    """A mask laid over its box and cut at `THRESHOLD`: uint8 `(height, width)`, 0 or 1.

    Values are interpolated bilinearly between the centres of the mask's cells; beyond the outermost
    ones they fall off, to a half at the edges of the box, which rounds the corners. mmdet does the
    same.

    Args:
        mask: float `(m, m)` in [0, 1].
        box: `(4,)`, x1 y1 x2 y2 in pixels; may reach out of the image.
        width, height: of the image, pixels.
    """
    canvas = np.zeros((height, width), np.uint8)
    x1, y1, x2, y2 = box.tolist()
    if not np.isfinite([x1, y1, x2, y2]).all() or x2 <= x1 or y2 <= y1:
        return canvas
    # Pixels whose centres are within the box; beyond it values cannot reach a half.
    left, right = max(0, int(np.floor(x1))), min(width, int(np.ceil(x2)))
    top, bottom = max(0, int(np.floor(y1))), min(height, int(np.ceil(y2)))
    if left >= right or top >= bottom:
        return canvas
    across = (torch.arange(left, right) + 0.5 - x1) / (x2 - x1) * 2 - 1
    down = (torch.arange(top, bottom) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=2)
    values = F.grid_sample(mask[None, None].float(), grid[None], align_corners=False)[0, 0]
    canvas[top:bottom, left:right] = (values >= THRESHOLD).numpy()
    return canvas


def encode(masks: Tensor, boxes: Tensor, width: int, height: int) -> list[Segment]:
    """Run lengths of each mask `(k, m, m)` in its box `(k, 4)`, in COCO's form; some hundred bytes
    each, where the pixels would be as many as the image has."""
    return [
        coco_mask.encode(np.asfortranarray(paste(mask, box, width, height)))
        for mask, box in zip(masks.cpu(), boxes.cpu(), strict=True)
    ]

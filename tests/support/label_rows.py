"""Labels and detections of a 100 px image, written as corners in pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.models.base import Detections

SIZE = 100


def label(*rows: tuple[float, ...]) -> Tensor:
    """Rows of category, x1, y1, x2, y2 in pixels of a 100 px image, as labels."""
    corners = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    boxes = corners[:, 1:] / SIZE
    centre, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return torch.cat([corners[:, :1], centre, sides], dim=1)


def found(*rows: tuple[float, ...]) -> Detections:
    """The same rows as detections, scores falling from 0.9."""
    corners = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    scores = 0.9 - 0.1 * torch.arange(len(corners))
    return Detections(corners[:, 1:], scores, corners[:, 0].long())


NOTHING = found()
A = (1, 10, 10, 40, 40)
B = (2, 60, 60, 90, 90)

"""What several tests take: of `test_listing` and others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfq.models.base import Boundary
from dfq.models.yolov5.detector import YOLOv5

FIRST = "model.0.conv"


LAST = ("model.9.m.0", "model.9.m.1")


class Shared(nn.Module):
    """One convolution under two names, as heads share theirs between levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.levels = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1)) for _ in range(2)])
        self.levels[1][0] = self.levels[0][0]
        self.token = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first, second = self.levels[0](x), self.levels[1](x[..., ::2, ::2])
        pooled = torch.stack([first.mean((2, 3)), second.mean((2, 3))], dim=1)
        return self.token(pooled)


class SharedDetector(YOLOv5):
    """The few parts of the protocol that conversion asks for."""

    def __init__(self) -> None:
        self.module = Shared().eval()
        self.names, self.image_size, self.stride = ["a"], 16, 8

    def raw(self, images: Tensor) -> list[Tensor]:
        return [self.module(images)]

    def boundary_layers(self) -> Boundary:
        return Boundary(("stem",), ("token",))

"""Small classifiers as their trainers save them, and images in class folders."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dfq.models.classifiers.resnet import ResNet

CLASSES = ("cat", "dog", "emu")


def small_resnet(projection: str = "shortcut", *, projected: bool = False) -> dict[str, Tensor]:
    """The state dict of a ResNet-8 for small images, with statistics that are not the initial
    ones."""
    network = ResNet(
        stem=8, widths=[8, 16, 24], depths=[1, 1, 1], projected=[False, projected, projected],
        projection=projection, head="linear", num_classes=len(CLASSES),
    )  # fmt: skip
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, 3, 32, 32))
    return network.eval().state_dict()


class PlainViT(nn.Module):
    """A vision transformer as people write it, on PyTorch's own encoder."""

    def __init__(self, *, norm_first: bool = False, activation: str = "relu") -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 16, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 16))
        layer = nn.TransformerEncoderLayer(
            16, 4, 24, activation=activation, batch_first=True, norm_first=norm_first
        )
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.mlp_head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, len(CLASSES)))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        return self.mlp_head(self.transformer(tokens + self.pos_embed)[:, 0])


def write_classes(folder: Path, each: int = 2, names: tuple[str, ...] = CLASSES) -> Path:
    """Images of noise, `each` a category, in a folder of its name."""
    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(each):
            pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def packed(folder: Path, file: Path, *, below: str = "") -> Path:
    """A ZIP file of a folder's images."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, below + path.relative_to(folder).as_posix())
    return file


def saved(path: Path, tensors: Any) -> Path:
    torch.save(tensors, path)
    return path

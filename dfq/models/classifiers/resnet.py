"""Residual networks for small images (He et al., CVPR 2016, sec. 4.2), known by their tensors.

The stem is one 3 x 3 convolution, and nothing is pooled before the end. Which of the usual ways a
network has with its shortcuts, its names say: tensors `shortcut` or `downsample` are projections;
where there are none, channels are padded with zeros (option A).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...runtime.limits import MOST_REPEATS, WIDEST
from ..classifying import Preprocessing

KIND = "resnet"
_FIRST = re.compile(r"layer(\d{1,4})\.(\d{1,4})\.conv1\.weight")
HEADS = ("linear", "fc")
PROJECTIONS = ("shortcut", "downsample")
PREPROCESSING = Preprocessing(32)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, and a shortcut past both.

    Args:
        inputs, outputs: channels.
        stride: of the first one.
        projection: what the shortcut's convolution is called; None: it has none.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, projection: str | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.stride, self.extra, self.projection = stride, outputs - inputs, projection
        if projection is not None:
            branch = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
            setattr(self, projection, branch)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, inputs, h, w)` to `(n, outputs, h / stride, w / stride)`."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.projection is not None:
            x = getattr(self, self.projection)(x)
        elif self.stride > 1 or self.extra:
            before = self.extra // 2
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before)
            )
        return self.relu(y + x)


class ResNet(nn.Module):
    """Stages of residual blocks, each but the first of which halves the sides.

    Args:
        widths, depths: channels and blocks of each stage.
        stem: channels of the first convolution.
        projected: by stage, whether its first block has a projection.
        projection: what these are called.
        head: what the last layer is called.
        num_classes: its outputs.
    """

    def __init__(
        self,
        *,
        stem: int,
        widths: list[int],
        depths: list[int],
        projected: list[bool],
        projection: str,
        head: str,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self._stages, self._head = [], head
        inputs = stem
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for number in range(depth):
                first = number == 0
                stride = 2 if first and index else 1
                called = projection if first and projected[index] else None
                blocks.append(BasicBlock(inputs, width, stride, called))
                inputs = width
            self._stages.append(f"layer{index + 1}")
            setattr(self, self._stages[-1], nn.Sequential(*blocks))
        setattr(self, head, nn.Linear(inputs, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `(n, 3, h, w)` to logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in self._stages:
            x = getattr(self, stage)(x)
        return getattr(self, self._head)(x.mean(dim=(2, 3)))


def described(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments of `ResNet`, but for the classes, of the network whose tensors these are; None
    where they are of another kind."""
    stem = tensors.get("conv1.weight")
    head = next((name for name in HEADS if f"{name}.weight" in tensors), None)
    if head is None or stem is None or stem.ndim != 4 or stem.shape[1:] != (3, 3, 3):
        return None
    # Of bottlenecks there are none for small images here.
    if any(".conv3." in name for name in tensors):
        return None
    block_widths: dict[int, dict[int, int]] = {}
    for name, tensor in tensors.items():
        match = _FIRST.fullmatch(name)
        if match and tensor.ndim == 4:
            block_widths.setdefault(int(match[1]), {})[int(match[2])] = len(tensor)
    stages = sorted(block_widths)
    if not stages or stages != list(range(1, len(stages) + 1)):
        return None
    if any(
        sorted(block_widths[stage]) != list(range(len(block_widths[stage]))) for stage in stages
    ):
        return None
    projected = {
        name: [f"layer{stage}.0.{name}.0.weight" in tensors for stage in stages]
        for name in PROJECTIONS
    }
    projection = next((name for name in PROJECTIONS if any(projected[name])), PROJECTIONS[0])
    return {
        "stem": len(stem),
        "widths": [block_widths[stage][0] for stage in stages],
        "depths": [len(block_widths[stage]) for stage in stages],
        "projected": projected[projection],
        "projection": projection,
        "head": head,
    }


def build(arguments: dict[str, Any], num_classes: int, source: str) -> nn.Module:
    """The network of a description.

    Raises:
        UserError: the description is none of `described`'s.
    """
    keys = {"stem", "widths", "depths", "projected", "projection", "head"}
    lists = [arguments.get(key) for key in ("widths", "depths", "projected")]
    fits = (
        set(arguments) == keys
        and all(isinstance(part, list) and 0 < len(part) <= 16 for part in lists)
        and len({len(part) for part in lists if isinstance(part, list)}) == 1
        and all(_is_size(v, WIDEST) for v in [arguments["stem"], *arguments["widths"]])
        and all(_is_size(v, MOST_REPEATS) for v in arguments["depths"])
        and all(isinstance(v, bool) for v in arguments["projected"])
        and arguments["projection"] in PROJECTIONS
        and arguments["head"] in HEADS
    )
    if not fits:
        raise UserError(f"the description of {source} is damaged (at 'network')")
    return ResNet(**arguments, num_classes=num_classes)


def stride(arguments: dict[str, Any]) -> int:
    """Of the network: image sides have to be multiples of it."""
    return int(2 ** (len(arguments["widths"]) - 1))


def _is_size(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most

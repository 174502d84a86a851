"""The blocks of the original YOLOv5. Names of modules and parameters follow the original's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Activation = Callable[[], nn.Module]

BN_EPS = 1e-3
_BN_MOMENTUM = 0.03


class Conv(nn.Module):
    """Convolution without bias, batch normalisation, activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        *,
        activation: Activation,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=BN_EPS, momentum=_BN_MOMENTUM)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Focus(nn.Module):
    """Every 2 × 2 patch of pixels into channels, then a `Conv` (the stem before v6)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        *,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.conv = Conv(
            4 * inputs, outputs, kernel, stride, padding, groups, activation=activation
        )

    def forward(self, x: Tensor) -> Tensor:
        patches = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.conv(torch.cat(patches, dim=1))


class Bottleneck(nn.Module):
    """A 1 × 1 and a 3 × 3 `Conv`, with a residual sum where the widths agree."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
        *,
        activation: Activation,
    ) -> None:
        super().__init__()
        hidden = int(outputs * expansion)
        self.cv1 = Conv(inputs, hidden, 1, activation=activation)
        self.cv2 = Conv(hidden, outputs, 3, groups=groups, activation=activation)
        self.add = shortcut and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3(nn.Module):
    """Cross-stage partial block of three convolutions around `repeats` bottlenecks."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        repeats: int = 1,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
        *,
        activation: Activation,
    ) -> None:
        super().__init__()
        hidden = int(outputs * expansion)
        self.cv1 = Conv(inputs, hidden, activation=activation)
        self.cv2 = Conv(inputs, hidden, activation=activation)
        self.cv3 = Conv(2 * hidden, outputs, activation=activation)
        self.m = nn.Sequential(
            *(
                Bottleneck(hidden, hidden, shortcut, groups, 1.0, activation=activation)
                for _ in range(repeats)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))


class SPP(nn.Module):
    """Spatial pyramid pooling: max pools of several sizes side by side."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernels: tuple[int, ...] = (5, 9, 13),
        *,
        activation: Activation,
    ) -> None:
        super().__init__()
        hidden = inputs // 2
        self.cv1 = Conv(inputs, hidden, activation=activation)
        self.cv2 = Conv(hidden * (len(kernels) + 1), outputs, activation=activation)
        self.m = nn.ModuleList(nn.MaxPool2d(k, stride=1, padding=k // 2) for k in kernels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], dim=1))


class SPPF(nn.Module):
    """`SPP` with one pool applied three times, which gives the sizes k, 2k - 1 and 3k - 2."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 5, *, activation: Activation
    ) -> None:
        super().__init__()
        hidden = inputs // 2
        self.cv1 = Conv(inputs, hidden, activation=activation)
        self.cv2 = Conv(hidden * 4, outputs, activation=activation)
        self.m = nn.MaxPool2d(kernel, stride=1, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [self.cv1(x)]
        for _ in range(3):
            pooled.append(self.m(pooled[-1]))
        return self.cv2(torch.cat(pooled, dim=1))


class Concat(nn.Module):
    """Concatenation of its inputs along the channels."""

    def forward(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1)


class Detect(nn.Module):
    """One 1 × 1 convolution a level.

    Attributes:
        anchors: buffer `(levels, anchors, 2)`, widths and heights in units of the level's stride.
        strides: pixels a cell, by level.
    """

    anchors: Tensor

    def __init__(self, num_classes: int, anchors: Tensor, widths: list[int], strides: list[int]):
        super().__init__()
        self.outputs = num_classes + 5
        self.strides = strides
        self.register_buffer("anchors", anchors.clone().float())
        self.m = nn.ModuleList(
            nn.Conv2d(width, self.outputs * anchors.shape[1], kernel_size=1) for width in widths
        )

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """Logits `(n, anchors, h, w, 5 + classes)` a level."""
        result = []
        for head, x in zip(self.m, levels, strict=True):
            y = head(x)
            n, _, h, w = y.shape
            y = y.view(n, -1, self.outputs, h, w).permute(0, 1, 3, 4, 2).contiguous()
            result.append(y)
        return result

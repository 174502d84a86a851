"""The network of the original, anchor-based YOLOv5 (v5 to v7), built from its own description.

A YOLOv5 checkpoint carries its architecture as a dictionary (the `yaml` of its model): depth and
width multiples, anchors, and one row `[from, repeats, module, arguments]` a layer. Module and
parameter names follow the original's, so that its weights load strictly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

Activation = Callable[[], nn.Module]

# By the name of the class in `torch.nn`; the original uses SiLU unless its description says else.
ACTIVATIONS: dict[str, Activation] = {
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "Hardswish": nn.Hardswish,
}

_BN_EPS = 1e-3
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
        self.bn = nn.BatchNorm2d(outputs, eps=_BN_EPS, momentum=_BN_MOMENTUM)
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


@dataclass(frozen=True)
class _Shape:
    """What a layer puts out: its width, and how many input pixels one of its cells spans."""

    channels: int
    stride: Fraction


class YOLOv5Network(nn.Module):
    """The network that a YOLOv5 description stands for, with random weights, in eval mode.

    Args:
        description: the checkpoint's `yaml`: `nc`, `depth_multiple`, `width_multiple`, `anchors`
            (pixels, one row a level), `backbone`, `head`, and optionally `ch` (input channels).
        anchors: `(levels, anchors, 2)` in units of the stride, to be used in the place of the
            description's (training may have changed them), or None.
        activation: a key of `ACTIVATIONS`.

    Raises:
        UserError: the description names a module that is not supported, or is malformed.
    """

    def __init__(
        self,
        description: dict[str, Any],
        anchors: Tensor | None = None,
        activation: str = "SiLU",
    ) -> None:
        super().__init__()
        try:
            builder = _Builder(description, anchors, ACTIVATIONS[activation])
            layers = builder.build()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(
                f"the YOLOv5 architecture description is malformed ({error!r}): "
                "it needs nc, depth_multiple, width_multiple, anchors, backbone and head"
            ) from error
        self.model = nn.Sequential(*layers)
        self.sources = builder.sources
        self._needed = {source for row in self.sources for source in row}
        self.eval()

    @property
    def detect(self) -> Detect:
        """The last layer."""
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits `(n, anchors, h, w, 5 + classes)` a level, for images `(n, 3, h, w)`."""
        outputs: dict[int, Any] = {-1: images}
        result: Any = images
        for index, (layer, sources) in enumerate(zip(self.model, self.sources, strict=True)):
            inputs = [outputs[source] for source in sources]
            result = layer(inputs if isinstance(layer, (Concat, Detect)) else inputs[0])
            if index in self._needed:
                outputs[index] = result
        return result


# Modules whose first argument is a width, which the width multiple scales.
_SCALED: dict[str, type[nn.Module]] = {
    "Conv": Conv,
    "Focus": Focus,
    "Bottleneck": Bottleneck,
    "C3": C3,
    "SPP": SPP,
    "SPPF": SPPF,
}


class _Builder:
    """Turns the rows of a description into modules, following widths and strides."""

    def __init__(
        self, description: dict[str, Any], anchors: Tensor | None, activation: Activation
    ) -> None:
        self._description = description
        self._activation = activation
        self._classes = int(description["nc"])
        self._depth = float(description["depth_multiple"])
        self._width = float(description["width_multiple"])
        self._anchors = anchors
        # The number of anchors a cell; a bare number means they were learnt from the data.
        listed = description["anchors"]
        if anchors is not None:
            self._anchor_count = anchors.shape[1]
        elif isinstance(listed, int):
            self._anchor_count = listed
        else:
            self._anchor_count = len(listed[0]) // 2
        self._shapes: list[_Shape] = []
        self._input = _Shape(int(description.get("ch", 3)), Fraction(1))
        self.sources: list[tuple[int, ...]] = []

    def build(self) -> list[nn.Module]:
        rows = [*self._description["backbone"], *self._description["head"]]
        layers = [self._layer(index, *row) for index, row in enumerate(rows)]
        if not layers or not isinstance(layers[-1], Detect):
            raise ValueError("the last layer is not Detect")
        return layers

    def _layer(
        self, index: int, origin: int | list[int], repeats: int, kind: str, arguments: list[Any]
    ) -> nn.Module:
        origins = [origin] if isinstance(origin, int) else origin
        sources = tuple(index + o if o < 0 else o for o in origins)
        if not all(-1 <= source < index for source in sources):
            raise ValueError(f"layer {index} takes its input from a later layer")
        self.sources.append(sources)
        inputs = [self._input if source < 0 else self._shapes[source] for source in sources]
        if repeats > 1:
            repeats = max(round(repeats * self._depth), 1)
        arguments = [_literal(argument) for argument in arguments]

        if kind in _SCALED:
            layer, shape = self._scaled(kind, inputs[0], repeats, arguments)
        elif kind == "nn.Upsample":
            layer, shape = _upsample(inputs[0], arguments)
        elif kind == "Concat":
            layer = Concat()
            shape = _Shape(sum(part.channels for part in inputs), inputs[0].stride)
        elif kind == "Detect":
            layer, shape = self._head(inputs), inputs[0]
        else:
            known = ", ".join([*_SCALED, "nn.Upsample", "Concat", "Detect"])
            raise UserError(
                f"layer {index} of this YOLOv5 is a {kind}, which is not supported: "
                f"supported are {known}"
            )
        self._shapes.append(shape)
        return layer

    def _scaled(
        self, kind: str, source: _Shape, repeats: int, arguments: list[Any]
    ) -> tuple[nn.Module, _Shape]:
        outputs, *rest = arguments
        if outputs != self._anchor_count * (self._classes + 5):
            outputs = math.ceil(outputs * self._width / 8) * 8
        if kind == "C3":
            rest, repeats = [repeats, *rest], 1
        modules = [
            _SCALED[kind](source.channels, outputs, *rest, activation=self._activation)
            for _ in range(repeats)
        ]
        step = 1
        if kind in ("Conv", "Focus"):
            step = (rest[1] if len(rest) > 1 else 1) * (2 if kind == "Focus" else 1)
        layer = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
        return layer, _Shape(outputs, source.stride * step ** len(modules))

    def _head(self, inputs: list[_Shape]) -> Detect:
        if any(level.stride.denominator != 1 for level in inputs):
            raise ValueError("a level of Detect is finer than the image")
        strides = [int(level.stride) for level in inputs]
        anchors = self._anchors
        if anchors is None:
            listed = self._description["anchors"]
            if isinstance(listed, int):
                raise ValueError("anchors are a number, and the checkpoint gives none")
            pixels = torch.tensor(listed, dtype=torch.float32).view(len(strides), -1, 2)
            anchors = pixels / torch.tensor(strides, dtype=torch.float32).view(-1, 1, 1)
        if anchors.shape != (len(strides), self._anchor_count, 2):
            raise ValueError(f"anchors of shape {tuple(anchors.shape)} for {len(strides)} levels")
        return Detect(self._classes, anchors, [level.channels for level in inputs], strides)


def _upsample(source: _Shape, arguments: list[Any]) -> tuple[nn.Module, _Shape]:
    size, scale, mode = arguments
    if size is not None or not isinstance(scale, int):
        raise ValueError("nn.Upsample needs a whole scale factor and no size")
    layer = nn.Upsample(scale_factor=scale, mode=mode)
    return layer, _Shape(source.channels, source.stride / scale)


def _literal(argument: Any) -> Any:
    """Descriptions hold Python constants as text."""
    constants = {"None": None, "True": True, "False": False}
    return constants.get(argument, argument) if isinstance(argument, str) else argument

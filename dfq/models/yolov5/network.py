"""The network of the original, anchor-based YOLOv5 (v5 to v7), built from its own description.

A YOLOv5 checkpoint carries its architecture as a dictionary (the `yaml` of its model): depth and
width multiples, anchors, and one row `[from, repeats, module, arguments]` a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...runtime.limits import LARGEST_MULTIPLE, MOST_CLASSES, MOST_REPEATS, MOST_ROWS, WIDEST
from ...runtime.plain import brief, one_line, plain_tree
from .. import activations
from ..bounded import bounded
from .blocks import C3, SPP, SPPF, Activation, Bottleneck, Concat, Conv, Detect, Focus


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
        activation: as `activation_text` takes it.

    Raises:
        UserError: the description names a module that is not supported, is malformed, or asks for
            more than `limits` allows.
    """

    def __init__(
        self,
        description: dict[str, Any],
        anchors: Tensor | None = None,
        activation: str = "SiLU",
    ) -> None:
        super().__init__()
        text = activation_text(activation)
        tree = plain_tree(description, "the YOLOv5 architecture description")
        try:
            with torch.device("meta"), bounded("the YOLOv5 architecture description"):
                # Where tensors have no numbers: too many of them are found out at once.
                _Builder(tree, anchors, lambda: activations.make(text)).build()
            builder = _Builder(tree, anchors, lambda: activations.make(text))
            layers = builder.build()
        except (
            *(KeyError, TypeError, ValueError, IndexError, AttributeError),
            *(ArithmeticError, RuntimeError),
        ) as error:
            raise UserError(
                f"the YOLOv5 architecture description is malformed ({one_line(error)}): "
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


def activation_text(activation: Any) -> str:
    """An activation and its arguments, as `activations.parse` gives it.

    Args:
        activation: what that takes; or a name alone, which stands for the original's arguments.

    Raises:
        UserError: it is none.
    """
    if isinstance(activation, str) and activations.is_name(activation):
        activation = "LeakyReLU(0.1)" if activation == "LeakyReLU" else f"{activation}()"
    return activations.parse(activation)


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
        self._classes = description["nc"]
        if type(self._classes) is not int or not 1 <= self._classes <= MOST_CLASSES:
            raise ValueError(f"nc is {brief(self._classes)}")
        self._depth = _multiple(description, "depth_multiple")
        self._width = _multiple(description, "width_multiple")
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
        channels = description.get("ch", 3)
        if channels != 3:
            raise UserError(
                f"this YOLOv5 takes images of {brief(channels)} channels: only RGB detectors work"
            )
        self._input = _Shape(3, Fraction(1))
        self.sources: list[tuple[int, ...]] = []

    def build(self) -> list[nn.Module]:
        rows = [*self._description["backbone"], *self._description["head"]]
        if len(rows) > MOST_ROWS:
            raise ValueError(f"it has over {MOST_ROWS} layers")
        layers = [self._layer(index, *row) for index, row in enumerate(rows)]
        if not layers or not isinstance(layers[-1], Detect):
            raise ValueError("the last layer is not Detect")
        return layers

    def _layer(
        self, index: int, origin: int | list[int], repeats: int, kind: str, arguments: list[Any]
    ) -> nn.Module:
        if type(kind) is not str or type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
            raise ValueError(f"layer {index} is {brief(kind)}, {brief(repeats)} times")
        origins = [origin] if isinstance(origin, int) else origin
        sources = tuple(index + o if o < 0 else o for o in origins)
        if not all(-1 <= source < index for source in sources):
            raise ValueError(f"layer {index} takes its input from a later layer")
        self.sources.append(sources)
        inputs = [self._input if source < 0 else self._shapes[source] for source in sources]
        if repeats > 1:
            repeats = max(round(repeats * self._depth), 1)
            if repeats > MOST_REPEATS:
                raise ValueError(f"layer {index} is repeated {repeats} times")
        arguments = [_literal(argument) for argument in arguments]

        if kind in _SCALED:
            layer, shape = self._scaled(kind, inputs[0], repeats, arguments)
        elif kind == "nn.Upsample":
            layer, shape = _upsample(inputs[0], arguments)
        elif kind == "Concat":
            if arguments not in ([1], []):
                raise ValueError(f"layer {index} concatenates along another dimension")
            layer = Concat()
            shape = _Shape(sum(part.channels for part in inputs), inputs[0].stride)
        elif kind == "Detect":
            layer, shape = self._head(inputs), inputs[0]
        else:
            known = ", ".join([*_SCALED, "nn.Upsample", "Concat", "Detect"])
            raise UserError(
                f"layer {index} of this YOLOv5 is a {brief(kind)[1:-1]}, which is not supported: "
                f"supported are {known}"
            )
        self._shapes.append(shape)
        return layer

    def _scaled(
        self, kind: str, source: _Shape, repeats: int, arguments: list[Any]
    ) -> tuple[nn.Module, _Shape]:
        outputs, *rest = arguments
        numbers = [part for item in arguments for part in (item if _is_list(item) else [item])]
        if not all(part is None or _is_small(part) for part in numbers) or not outputs:
            raise ValueError(f"a {kind} has the arguments {', '.join(map(brief, arguments))}")
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
    if size is not None or not isinstance(scale, int) or not 1 <= scale <= 32:
        raise ValueError("nn.Upsample needs a whole scale factor and no size")
    if mode not in ("nearest", "bilinear", "bicubic", "area"):
        raise ValueError(f"nn.Upsample has the mode {brief(mode)}")
    layer = nn.Upsample(scale_factor=scale, mode=mode)
    return layer, _Shape(source.channels, source.stride / scale)


def _multiple(description: dict[str, Any], key: str) -> float:
    value = description[key]
    if type(value) not in (int, float) or not 0 < value <= LARGEST_MULTIPLE:
        raise ValueError(f"{key} is {brief(value)}")
    return float(value)


def _is_list(item: Any) -> bool:
    return isinstance(item, list | tuple)


def _is_small(part: Any) -> bool:
    return isinstance(part, int | float) and abs(part) <= WIDEST


def _literal(argument: Any) -> Any:
    """Descriptions hold Python constants as text."""
    constants = {"None": None, "True": True, "False": False}
    return constants.get(argument, argument) if isinstance(argument, str) else argument

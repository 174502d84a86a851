"""What detects, seen from outside: how it is asked, and which of its parts become files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..runtime.limits import LARGEST_SIDE

if TYPE_CHECKING:
    from .base import Detections


Task = Literal["detection", "classification"]
"""What a model is for: to find objects, or to say of what category a whole image is."""


@dataclass(frozen=True)
class Part:
    """Something that a detector's file leaves out, to be exported as a file of its own.

    Attributes:
        run: takes a tensor `(k, ...)`, gives one of k rows for each of `outputs`.
        shape: of its input, without k.
        outputs: their names.
    """

    run: Callable[[Tensor], tuple[Tensor, ...]]
    shape: tuple[int, ...]
    outputs: tuple[str, ...]


class Predicting(Protocol):
    """What evaluation and prediction need of a model of any task: a `Model`, or an exported
    file."""

    @property
    def task(self) -> Task:
        """What it is for."""

    @property
    def names(self) -> list[str]:
        """Category names, by index."""

    @property
    def image_size(self) -> int:
        """Side in pixels that it is for."""

    @property
    def stride(self) -> int:
        """Image sides are multiples of it."""

    @property
    def source(self) -> str:
        """What the user named, for messages."""

    @property
    def device(self) -> torch.device:
        """Where it takes images."""

    def check_size(self, size: int, key: str = "image size") -> None:
        """Raise a `UserError` for a side in pixels that it cannot take."""


class Detecting(Predicting, Protocol):
    """What evaluation and prediction need of a detector: a `Detector`, or an exported file."""

    @property
    def has_masks(self) -> bool:
        """Whether it predicts instance masks."""

    @property
    def fixed_batch(self) -> int | None:
        """Images that a call takes, no more and no fewer; None: any number."""

    def detect(self, images: Tensor, *, masks: bool = False, **thresholds: Any) -> list[Detections]:
        """Detections for images `(n, 3, h, w)` in [0, 1], RGB, one per image."""


def check_side(size: int, stride: int, key: str) -> None:
    """Refuse a side in pixels that is no positive multiple of a stride, or beyond all use.

    Args:
        size: the side.
        stride: of the model.
        key: what the user set the side by, for the message.

    Raises:
        UserError: names the nearest sides that are possible.
    """
    if size < stride or size % stride:
        below = max(size, 0) // stride * stride
        near = f"{below} or {below + stride}" if below else f"{stride}"
        raise UserError(f"{key}: {size} is no multiple of the model's stride {stride}; try {near}")
    if size > LARGEST_SIDE:
        raise UserError(f"{key}: {size} is too large; up to {LARGEST_SIDE} is possible")

"""Data types of the model interface: labels and detections of a batch, outputs to compare, kinds of
prediction, first and last layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Labels of a batch as one flat tensor.

    Attributes:
        data: float32 `(n, 6)`: image index in the batch, category index, and the box as
            centre x, centre y, width, height, normalised to [0, 1] by the image's sides.
    """

    data: Tensor

    def __post_init__(self) -> None:
        if self.data.ndim != 2 or self.data.shape[1] != 6:
            raise ValueError(f"targets must have shape (n, 6), got {tuple(self.data.shape)}")

    def __len__(self) -> int:
        return self.data.shape[0]

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Targets:
        return cls(torch.zeros(0, 6, device=device))

    @classmethod
    def from_per_image(cls, labels: Sequence[Tensor]) -> Targets:
        """Batch per-image labels `(n_i, 5)` (category, cx, cy, w, h) into one flat tensor."""
        rows = [
            torch.cat([label.new_full((len(label), 1), float(index)), label], dim=1)
            for index, label in enumerate(labels)
        ]
        return cls(torch.cat(rows)) if rows else cls.empty()

    def per_image(self, batch: int) -> list[Tensor]:
        """The inverse of `from_per_image`: `batch` tensors `(n_i, 5)`."""
        return [self.data[self.data[:, 0] == index, 1:] for index in range(batch)]

    def rows(self, start: int, stop: int) -> Targets:
        """Those of the images start .. stop - 1, numbered from 0."""
        image = self.data[:, 0]
        data = self.data[(image >= start) & (image < stop)]
        return Targets(torch.cat([data[:, :1] - start, data[:, 1:]], dim=1))

    def to(self, device: torch.device | str) -> Targets:
        return Targets(self.data.to(device))

    def flip_horizontal(self, flipped: Tensor) -> Targets:
        """Mirror the boxes of the images where the boolean tensor `flipped` `(batch,)` is true."""
        flips = flipped[self.data[:, 0].long()]
        scale, offset = _mirror(self.data.dtype, self.data.device)
        # 1 - x, exactly.
        mirrored = torch.addcmul(offset, self.data, scale)
        return Targets(torch.where(flips[:, None], mirrored, self.data))


@functools.lru_cache(maxsize=16)
def _mirror(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a row of labels, `(6,)` each: factors and summands that mirror it."""
    scale = torch.tensor([1, 1, -1, 1, 1, 1], dtype=dtype).to(device)
    return scale, torch.tensor([0, 0, 1, 0, 0, 0], dtype=dtype).to(device)


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image.

    Attributes:
        boxes: float32 `(n, 4)`, x1 y1 x2 y2 in pixels of the image given to `detect`.
        scores: float32 `(n,)` in [0, 1], descending.
        labels: int64 `(n,)`, category indices into `Detector.names`.
        masks: float32 `(k, m, m)` in [0, 1], or None: of the first k detections, how likely each
            cell of an even grid over the box belongs to the object.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.boxes.shape[0]
        if self.masks is not None and (self.masks.ndim != 3 or len(self.masks) > n):
            raise ValueError(f"{n} detections with masks of shape {tuple(self.masks.shape)}")
        if self.boxes.shape != (n, 4) or self.scores.shape != (n,) or self.labels.shape != (n,):
            raise ValueError(
                f"detections disagree: boxes {tuple(self.boxes.shape)}, scores "
                f"{tuple(self.scores.shape)}, labels {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return self.boxes.shape[0]


@dataclass(frozen=True)
class DistillationPair:
    """One output of student and teacher, and what kind of distribution it is.

    Attributes:
        name: what it is, for logs ("class", "box", "objectness").
        student, teacher: tensors of one shape.
        kind: `bernoulli`: independent logits, one sigmoid each; `categorical`: logits of a softmax
            over dimension `dim`; `value`: plain numbers, compared by squared distance.
        dim: the dimension a categorical distribution runs over.
        weight: broadcastable to `student` (for `categorical`: with `dim` of size 1), or None: how
            much each place matters, e.g. the teacher's objectness for boxes.
    """

    name: str
    student: Tensor
    teacher: Tensor
    kind: Literal["bernoulli", "categorical", "value"]
    dim: int = -1
    weight: Tensor | None = None


@dataclass(frozen=True)
class Kinds:
    """How a layer's output channels are divided among kinds of prediction.

    Attributes:
        repeats: how often the kinds follow each other, once for each anchor.
        sizes: channels of each kind, in their order.
    """

    repeats: int
    sizes: tuple[int, ...]

    def channels(self, kind: int) -> list[int]:
        """Those that hold one kind."""
        total, first = sum(self.sizes), sum(self.sizes[:kind])
        return [
            start + first + channel
            for start in range(0, self.repeats * total, total)
            for channel in range(self.sizes[kind])
        ]


@dataclass(frozen=True)
class Boundary:
    """Qualified module names of the layers a policy treats apart.

    Attributes:
        first: layers that see the image.
        last: layers whose outputs are the raw predictions.
    """

    first: tuple[str, ...] = field(default=())
    last: tuple[str, ...] = field(default=())

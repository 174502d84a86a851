"""What a family says of its network: outputs to compare, kinds of prediction, end layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


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
        every, first = sum(self.sizes), sum(self.sizes[:kind])
        return [
            start + first + channel
            for start in range(0, self.repeats * every, every)
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

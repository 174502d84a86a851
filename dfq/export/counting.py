"""How much of a file its runtime really computes in integers, by the runtime's own account."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .opening import LiteRtFile, OnnxFile, OpenVinoFile, RuntimeFile


@dataclass(frozen=True)
class Operation:
    """A convolution, linear layer or matrix product as a runtime executes it.

    Attributes:
        name: as the file has it.
        type: the runtime's own.
        macs: multiply-accumulates for one image.
        integers: whether 8-bit integers are multiplied.
        reason: why not; None where they are.
    """

    name: str
    type: str
    macs: int
    integers: bool
    reason: str | None = None


@dataclass(frozen=True)
class IntegerShare:
    """What of a file is computed in integers.

    Attributes:
        operations: all that count.
        counted_from: where it was read.
    """

    operations: tuple[Operation, ...]
    counted_from: str

    @property
    def share_of_macs(self) -> float:
        """In [0, 1]; 0 where there is nothing to multiply."""
        total = sum(operation.macs for operation in self.operations)
        in_integers = sum(operation.macs for operation in self.operations if operation.integers)
        return in_integers / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "share_of_macs": self.share_of_macs,
            "counted_from": self.counted_from,
            "operations": len(self.operations),
            "float_operations": [
                {
                    "name": operation.name,
                    "type": operation.type,
                    "macs": operation.macs,
                    "reason": operation.reason,
                }
                for operation in self.operations
                if not operation.integers
            ],
        }


def count(file: RuntimeFile) -> IntegerShare:
    """What of a file its runtime computes in integers.

    Args:
        file: opened; images of the side that it was opened for are counted.
    """
    from .counting_litert import count_litert
    from .counting_onnx import count_onnx
    from .counting_openvino import count_openvino

    counters: Sequence[tuple[type, Callable[[Any], IntegerShare]]] = (
        (OnnxFile, count_onnx),
        (OpenVinoFile, count_openvino),
        (LiteRtFile, count_litert),
    )
    for kind, counter in counters:
        if isinstance(file, kind):
            return counter(file)
    return IntegerShare((), "PyTorch executes Q/DQ programs in float")

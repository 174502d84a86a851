"""What `dfq verify` finds out about a file, for people and as JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any

from .counting import IntegerShare
from .parity import Parity
from .ranges import Fit

KIND = "dfq verification"

_BLAMED = 5


class Movement(ABC):
    """How far what a file says moved from what its float model says.

    Attributes:
        side_ratio, threshold: of boxes, see `Moved`; None where there are none.
    """

    side_ratio: float | None
    threshold: float | None

    @abstractmethod
    def as_before(self) -> bool:
        """Whether it hardly moved."""

    def lost(self) -> str | None:
        """The fault of a file that says something else than its float model, whatever the reason;
        None where it does not, or faults of its task name that."""
        return None

    @abstractmethod
    def lines(self) -> list[str]:
        """For people."""

    @abstractmethod
    def clause(self) -> str | None:
        """For people, in a few words; None where there is nothing to say."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""


class Accuracy(ABC):
    """Of the file, of its reference in PyTorch, and of the float model, on a set.

    Attributes:
        metric: what it is called.
        difference: 95 % interval of the file's less the reference's over the draw of images; None
            where not measured.
    """

    metric: str
    difference: tuple[float, float] | None

    @property
    @abstractmethod
    def figures(self) -> tuple[float | None, float | None]:
        """Of the file, and of its reference; None where not measured."""

    @abstractmethod
    def lines(self) -> list[str]:
        """For people."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""

    def clause(self) -> str | None:
        """For people, in a few words; None where it was not measured."""
        value = self.figures[0]
        return None if value is None else f"{self.metric} {value:.4f}"


@dataclass(frozen=True)
class DetectionAccuracy(Accuracy):
    """Of the file, of its reference in PyTorch, and of the float model.

    Attributes:
        data: the set.
        images: how many it has.
        AP, reference_AP, float_AP: fractions in [0, 1]; None where not measured.
        difference: 95 % interval of AP minus reference_AP over the draw of images.
        agreement: with the float model's detections, where the set has no labels.
    """

    data: str
    images: int
    AP: float | None = None
    reference_AP: float | None = None
    float_AP: float | None = None
    difference: tuple[float, float] | None = None
    agreement: dict[str, Any] | None = None
    metric = "AP"

    @property
    def figures(self) -> tuple[float | None, float | None]:
        return self.AP, self.reference_AP

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        if self.agreement is not None:
            measured = self.agreement["AP"]
            text = "none, as it detects nothing" if measured is None else f"{measured:.4f}"
            return [f"AP against the float model's detections on {self.data}: {text}"]
        cells = {"file": self.AP, "PyTorch": self.reference_AP, "float": self.float_AP}
        return [f"AP on {self.images} images of {self.data}: {beside(cells, self.difference)}"]


def beside(cells: dict[str, float | None], difference: tuple[float, float] | None) -> str:
    """Figures by name, for people, and the interval of the first less the second."""
    text = ", ".join(f"{name} {value:.4f}" for name, value in cells.items() if value is not None)
    if difference is not None:
        low, high = difference
        text += f"; file minus PyTorch, 95 % interval: {low:+.4f} to {high:+.4f}"
    return text


@dataclass
class Verification:
    """What was found.

    Attributes:
        file, format, runtime, size_bytes, precision: of the file.
        against: what it was compared with.
        images: the images that it was compared on.
        parity: None where there is no reference program of it.
        integers: what its runtime computes in integers.
        accuracy: None without a set named.
        moved: what it says against what the float model says.
        blamed: activations whose grids fit worst; None where the file cannot be read so.
        notes: what a user should know of how this was measured.
        faults: by name; none where the file is right.
        command: that makes this again.
    """

    file: str
    format: str
    runtime: str
    size_bytes: int
    precision: str
    against: str
    images: str
    integers: IntegerShare
    command: str
    parity: Parity | None = None
    accuracy: Accuracy | None = None
    moved: Movement | None = None
    blamed: list[Fit] | None = None
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        parity = None if self.parity is None else self.parity.to_dict()
        return {
            "kind": KIND,
            "version": 1,
            "file": self.file,
            "format": self.format,
            "runtime": self.runtime,
            "size_bytes": self.size_bytes,
            "precision": self.precision,
            "against": self.against,
            "images": self.images,
            "parity": parity,
            "integers": self.integers.to_dict(),
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            **self._movement(),
            "worst_activations": None
            if self.blamed is None
            else [f.to_dict() for f in self.blamed],
            "notes": self.notes,
            "faults": self.faults,
            "command": self.command,
        }

    def lines(self) -> list[str]:
        """For people; the last one sums up."""
        text = [f"{self.format}, {self.size_bytes / 1e6:.1f} MB, {self.precision}, {self.runtime}"]
        text += self.notes
        text += self._parity() + self._integers()
        for part in (self.accuracy, self.moved):
            text += [] if part is None else part.lines()
        for fit in self.blamed or ():
            sqnr = "" if fit.sqnr is None else f"{fit.sqnr:.1f} dB, "
            text.append(f"  worst grids: {fit.name}: {sqnr}{fit.clipped:.2%} of its values clip")
        text += [f"FAULT: {fault}" for fault in self.faults]
        return [*text, self.summary()]

    def summary(self) -> str:
        """In a line."""
        if self.faults:
            count = len(self.faults)
            return f"{self.file}: {count} fault{'s' if count > 1 else ''}"
        if not self._is_compared:
            return (
                f"{self.file}: no fault, but nothing to compare it by: the float model detects "
                "nothing on these images; name others with --data"
            )
        clauses = [f"{self.file}: good"]
        if self.parity is not None:
            clauses.append("computes what PyTorch does")
        if self.integers.operations:
            clauses.append(f"{self.integers.share_of_macs:.1%} of the MACs in integers")
        said = [part.clause() for part in (self.moved, self.accuracy) if part is not None]
        return ", ".join([*clauses, *filter(None, said)])

    @property
    def threshold(self) -> float | None:
        """Score from which on a detector's file has as many detections as the float model from 0.25
        on; None where there is none."""
        return None if self.moved is None else self.moved.threshold

    def _movement(self) -> dict[str, Any]:
        """`moved` as JSON has it, beside it what it tells of thresholds."""
        moved = None if self.moved is None else self.moved.to_dict()
        return {
            "moved": moved,
            "threshold": None if moved is None else moved.pop("threshold", None),
        }

    @property
    def _is_compared(self) -> bool:
        """Whether anything told a right file from a wrong one."""
        moved = self.moved is not None and self.moved.clause() is not None
        measured = self.accuracy is not None and self.accuracy.figures[0] is not None
        return self.parity is not None or moved or measured

    def _parity(self) -> list[str]:
        if self.parity is None:
            return []
        text = []
        for name, distance in self.parity.outputs.items():
            verdict, floor = self.parity.held[name], self.parity.floor.get(name)
            rounding = "" if floor is None else f"; rounding alone: mean {floor.mean_steps:.3f}"
            text.append(
                f"parity {name}: {distance.share_within_one:.2%} within one step of "
                f"{distance.step:.3g}, mean {distance.mean_steps:.3f}, most "
                f"{distance.max_steps:.1f} steps ({verdict or 'FAILS'}{rounding})"
            )
        return text

    def _integers(self) -> list[str]:
        integers = self.integers
        if not integers.operations:
            return [f"integers: none ({integers.counted_from})"]
        text = [
            f"integers: {integers.share_of_macs:.1%} of the MACs of {len(integers.operations)} "
            f"layers ({integers.counted_from})"
        ]
        floats = [layer for layer in integers.operations if not layer.integers]
        shown = floats if integers.share_of_macs else floats[:3]
        text += [f"  in float: {layer.name} ({layer.type}): {layer.reason}" for layer in shown[:20]]
        unlisted = len(floats) - len(shown[:20])
        return [*text, f"  and {unlisted} more in float"] if unlisted else text


def worst(fits: list[Fit] | None) -> list[Fit] | None:
    """The activations to blame first."""
    if fits is None:
        return None
    if any(fit.sqnr is not None for fit in fits):
        order = sorted(fits, key=lambda fit: fit.sqnr if fit.sqnr is not None else 1e9)
    else:
        order = sorted(fits, key=lambda fit: -fit.clipped)
    # What a tensor is only turned or cut into is on its grid too, and fits as well.
    alike = {(fit.low, fit.high, fit.sqnr, fit.clipped): fit for fit in reversed(order)}
    return [fit for fit in order if alike.get((fit.low, fit.high, fit.sqnr, fit.clipped)) is fit][
        :_BLAMED
    ]

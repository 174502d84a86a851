"""What `dfq verify` finds out about a file, for people and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .counting import IntegerShare
from .movement import THRESHOLD, Moved
from .parity import Parity
from .ranges import Fit

KIND = "dfq verification"

_BLAMED = 5


@dataclass(frozen=True)
class Accuracy:
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
        moved: detections against the float model's.
        threshold: score from which on the file has as many detections as the float model from
            0.25 on; None where there is none.
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
    moved: Moved | None = None
    threshold: float | None = None
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
            "accuracy": None if self.accuracy is None else vars(self.accuracy),
            "moved": None if self.moved is None else self.moved.to_dict(),
            "threshold": {"float": THRESHOLD, "this": self.threshold},
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
        text += self._parity() + self._integers() + self._accuracy() + self._moved()
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
        if self.moved is not None and self.moved.all.detections:
            clauses.append(
                f"{self.moved.all.share:.1%} of the {self.moved.against}'s detections kept"
            )
        if self.accuracy is not None and self.accuracy.AP is not None:
            clauses.append(f"AP {self.accuracy.AP:.4f}")
        return ", ".join(clauses)

    @property
    def _is_compared(self) -> bool:
        """Whether anything told a right file from a wrong one."""
        detected = self.moved is not None and self.moved.all.detections > 0
        measured = self.accuracy is not None and self.accuracy.AP is not None
        return self.parity is not None or detected or measured

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

    def _accuracy(self) -> list[str]:
        accuracy = self.accuracy
        if accuracy is None:
            return []
        if accuracy.agreement is not None:
            measured = accuracy.agreement["AP"]
            text = "none, as it detects nothing" if measured is None else f"{measured:.4f}"
            return [f"AP against the float model's detections on {accuracy.data}: {text}"]
        cells = {"file": accuracy.AP, "PyTorch": accuracy.reference_AP, "float": accuracy.float_AP}
        text = ", ".join(f"{k} {v:.4f}" for k, v in cells.items() if v is not None)
        if accuracy.difference is not None:
            low, high = accuracy.difference
            text += f"; file minus PyTorch, 95 % interval: {low:+.4f} to {high:+.4f}"
        return [f"AP on {accuracy.images} images of {accuracy.data}: {text}"]

    def _moved(self) -> list[str]:
        if self.moved is None:
            return []
        overall, against = self.moved.all, self.moved.against
        if not overall.detections:
            return [f"moved: the {against} detects nothing above {THRESHOLD} on these images"]
        text = [
            f"moved: {overall.kept} of {overall.detections} detections of the {against} kept on "
            f"{self.moved.images} images{_words(overall)}"
        ]
        for name, group in [*self.moved.sizes.items(), *self.moved.worst.items()]:
            if group.detections and (group.share < 1 or name in self.moved.sizes):
                text.append(f"  {name}: {group.kept} of {group.detections}{_words(group)}")
        if self.threshold is not None and abs(self.threshold - THRESHOLD) >= 0.005:
            text.append(
                f"threshold: use {self.threshold:g} instead of {THRESHOLD:g} for as many "
                "detections as the float model has"
            )
        return text


def _words(group: Any) -> str:
    if group.box_iou is None:
        return ""
    return f", box IoU {group.box_iou:.3f}, scores {group.score_shift:+.3f}"


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

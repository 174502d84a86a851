"""Whether a file computes what its network does, output by output, in steps of 8 bits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

WITHIN_ONE = 0.999
"""Share of values no more than a step apart, from which on outputs are the same."""

TIMES_FLOOR = 1.5
"""A file may be so many times as far from PyTorch as PyTorch is from itself."""

TIMES_FLOOR_APPROXIMATE = 2.5
"""The same where a runtime has float functions of its own between grids: they differ from PyTorch's
by more than its own single precision does from double (the demo detector in OpenVINO: 1.9)."""

_BEYOND = 100
"""A percentile has so many values beyond it, or chance decides."""


@dataclass(frozen=True)
class Distance:
    """How far two executions of one output are apart.

    Only values that are more than a step from the output's median in one of the two count: almost
    all scores are close to zero, and would agree for any two networks.

    Attributes:
        step: range of the reference's values / 255.
        max_steps, mean_steps: largest and mean difference, in steps.
        percentile_steps: the 99.9th percentile of the difference, or the highest one with 100
            values beyond it, in steps.
        share_within_one: of the values that count, those no more than a step apart.
        values: how many count.
        finite: whether all values are.
    """

    step: float
    max_steps: float
    mean_steps: float
    percentile_steps: float
    share_within_one: float
    values: int
    finite: bool


EXACT = 0.01
"""Steps that the float parts behind integers may differ by."""


@dataclass(frozen=True)
class Parity:
    """The distance of each output, and the floor: that between two correct executions.

    Attributes:
        outputs, floor: by name of the output; no floor where it was not needed.
        held: by output what held: "within one step", "rounding floor", or None where neither did.
        images: of how many images.
    """

    outputs: dict[str, Distance]
    floor: dict[str, Distance]
    held: dict[str, str | None]
    images: int

    @property
    def holds(self) -> bool:
        """Whether every output is as it should be."""
        return all(self.held.values())

    @property
    def is_exact(self) -> bool:
        """Whether every output is the reference's but for its last bits. What AP then differs by
        from PyTorch's own run is how roundings fell there, and no doing of the file."""
        return all(output.max_steps < EXACT for output in self.outputs.values())

    def to_dict(self) -> dict[str, Any]:
        rows = asdict(self)
        for row in (*rows["outputs"].values(), *rows["floor"].values()):
            # JSON has no infinity.
            row.update({k: None for k, v in row.items() if v == math.inf})
        return {**rows, "holds": self.holds}


def distance(reference: np.ndarray, output: np.ndarray) -> Distance:
    """How far an output is from its reference, of the same shape."""
    expected, actual = reference.astype(np.float64).ravel(), output.astype(np.float64).ravel()
    finite = bool(np.isfinite(actual).all() and np.isfinite(expected).all())
    if not finite:
        return _apart(len(expected))
    low, high = float(expected.min()), float(expected.max())
    step = (high - low) / 255 or max(abs(high), 1e-6) / 255
    steps = np.abs(actual - expected) / step
    median = np.median(expected)
    counts = (np.abs(expected - median) > step) | (np.abs(actual - median) > step)
    if not counts.any():
        return Distance(step, float(steps.max()), float(steps.mean()), 0.0, 1.0, 0, True)
    counted = steps[counts]
    quantile = max(0.5, min(0.999, 1 - _BEYOND / len(counted)))
    return Distance(
        step,
        float(steps.max()),
        float(counted.mean()),
        float(np.quantile(counted, quantile)),
        float((counted <= 1).mean()),
        len(counted),
        True,
    )


def _apart(values: int) -> Distance:
    """Of outputs that cannot be compared."""
    return Distance(0.0, math.inf, math.inf, math.inf, 0.0, values, False)


def parity(
    reference: dict[str, np.ndarray],
    actual: dict[str, np.ndarray],
    otherwise: dict[str, np.ndarray] | None,
    times: float = TIMES_FLOOR,
) -> Parity:
    """Compare a file's outputs with the reference's, and judge them.

    Args:
        reference: outputs of the program, by name, of any shape.
        actual: those of the file, of the same shapes; `reference` names all that count.
        otherwise: those of the program computed in another valid way; None: there is no numerical
            floor.
        times: how many times that floor a file may be away.
    """
    outputs: dict[str, Distance] = {}
    floor: dict[str, Distance] = {}
    held: dict[str, str | None] = {}
    for name, wanted in reference.items():
        if name not in actual or actual[name].shape != wanted.shape:
            outputs[name] = _apart(wanted.size)
            held[name] = None
            continue
        outputs[name] = of_file = distance(wanted, actual[name])
        held[name] = None
        if otherwise is not None:
            floor[name] = distance(wanted, otherwise[name])
        least = floor.get(name)
        if of_file.share_within_one >= WITHIN_ONE:
            held[name] = "within one step"
        elif (
            least is not None
            and of_file.mean_steps <= times * least.mean_steps
            and of_file.percentile_steps <= times * least.percentile_steps
        ):
            held[name] = "rounding floor"
    return Parity(outputs, floor, held, len(next(iter(reference.values()))))

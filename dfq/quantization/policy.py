"""Which layers get which bits: `Policy`."""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass
from typing import Any

from .bit_widths import parse_widths
from .dynamic import DynamicQuantizer
from .logarithmic import LogarithmicQuantizer
from .peak import PeakQuantizer
from .piecewise import PiecewiseQuantizer
from .placement import EVERYWHERE, INPUTS, PLACEMENTS, Placement
from .quantizers import Quantizer


@dataclass(frozen=True)
class Policy:
    """Which layers get which bits.

    Attributes:
        weight_bits, activation_bits: 2 to 8, of activations up to 16.
        first_last_bits: of the layers that see the image and those that give the predictions:
            8, "float", or "same" as the others.
        weights: "per_channel" or "per_tensor".
        weight_grid: "asymmetric": below 8 bits each scale's grid has a zero point, so that its
            levels need not reach as far below zero as above; "symmetric". Either way values are
            integers of at most 8 bits times a step size, as runtimes multiply with. "piecewise":
            of two regions with a step each, which no runtime has.
        activations: "asymmetric" (LSQ+) or "symmetric" (LSQ; see `unsigned`).
        overrides: qualified layer name or wildcard -> "float", a bit width for both, or "w4a8";
            the first match counts and wins over everything else.
        scope: "all", or "backbone": layers outside it stay in float.
        placement: "inputs": weights and inputs of layers are quantized; "everywhere": also their
            outputs and what is added or concatenated (see `output_quantizers`); "qdq": as `runtime`
            needs it to compute in integers (see `placement`).
        runtime: a key of `placement.PLACEMENTS`; counts with "qdq" alone.
        activation_ranges: "static": found once, on a set; "dynamic": in each call anew.
        softmax: of what a softmax gives to a product: "uniform", as other activations; "log2":
            powers of two; "peak": up to the greatest value.
    """

    weight_bits: int = 4
    activation_bits: int = 8
    first_last_bits: int | str = 8
    weights: str = "per_channel"
    activations: str = "asymmetric"
    overrides: tuple[tuple[str, int | str], ...] = ()
    scope: str = "all"
    placement: str = "inputs"
    weight_grid: str = "asymmetric"
    runtime: str = "onnxruntime"
    activation_ranges: str = "static"
    softmax: str = "uniform"

    @property
    def where(self) -> Placement:
        """Where quantizers stand."""
        if self.placement == "qdq":
            return PLACEMENTS[self.runtime]
        return EVERYWHERE if self.placement == "everywhere" else INPUTS

    @property
    def asymmetric(self) -> bool:
        """Whether grids of activations have zero points."""
        return self.activations == "asymmetric" and not self.where.symmetric

    @property
    def unsigned(self) -> bool:
        """Whether symmetric grids of what is never below zero have all their levels above it: not
        where a runtime takes int8, in which such a grid has a zero point."""
        return self.activations == "symmetric" and not (self.where.symmetric or self.where.signed)

    def quantizer(self, bits: int) -> Quantizer:
        """One of activations."""
        if self.activation_ranges == "dynamic":
            return DynamicQuantizer(bits, asymmetric=self.asymmetric, unsigned=self.unsigned)
        return Quantizer(bits, asymmetric=self.asymmetric, unsigned=self.unsigned)

    def weight_quantizer(self, bits: int, outputs: int) -> Quantizer:
        """One of the weights of a layer with so many outputs."""
        channels = outputs if self.weights == "per_channel" else 1
        if self.weight_grid == "piecewise":
            return PiecewiseQuantizer(bits, channels=channels)
        narrow = self.where.narrow_weights
        shifted = self.shifts_weights(bits)
        return Quantizer(bits, channels=channels, asymmetric=shifted, narrow=narrow)

    def softmax_quantizer(self, bits: int) -> Quantizer:
        """One of what a softmax gives to a product."""
        if self.softmax == "log2":
            return LogarithmicQuantizer(bits)
        return PeakQuantizer(bits) if self.softmax == "peak" else self.quantizer(bits)

    def bits_for(
        self, name: str, boundary: bool, backbone: str | None = None
    ) -> tuple[int, int] | None:
        """(weight bits, activation bits) of a layer, or None where it stays in float.

        Args:
            name: of the layer.
            boundary: whether it sees the image or gives predictions.
            backbone: name of the backbone; looked at for that scope only.
        """
        for pattern, bits in self.overrides:
            if fnmatch.fnmatchcase(name, pattern):
                return parse_widths(bits)
        if self.scope == "backbone" and not name.startswith(f"{backbone}."):
            return None
        if boundary and self.first_last_bits != "same":
            if self.first_last_bits == "float":
                return None
            return int(self.first_last_bits), int(self.first_last_bits)
        return self.weight_bits, self.activation_bits

    def shifts_weights(self, bits: int) -> bool:
        """Whether grids of weights of so many bits have zero points."""
        # At 8 bits the grid is the runtimes' own, and has levels enough on either side.
        return self.weight_grid == "asymmetric" and bits < 8

    def is_fixed(self, name: str, boundary: bool) -> bool:
        """Whether a layer's bits are given by more than `weight_bits` and `activation_bits`."""
        named = any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in self.overrides)
        return named or (boundary and self.first_last_bits != "same")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "overrides": [list(pair) for pair in self.overrides]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Policy:
        overrides = tuple((str(name), bits) for name, bits in data.get("overrides", ()))
        # What was saved before there was a choice had no zero points of weights.
        return cls(**{"weight_grid": "symmetric", **data, "overrides": overrides})

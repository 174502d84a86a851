"""What a detector costs to keep and to run: operations, bytes, and an estimate of the energy.

All counts are exact; the energy is an estimate, and compares networks rather than devices. It is
made of counts of operations and of memory accesses, and of what Horowitz gives for each of them in
45 nm ("Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9):

- A multiplication of 8-bit integers takes 0.2 pJ, one of 32 bits 3.1 pJ. An array multiplier has a
  cell for each pair of bits, and indeed the two differ by about 4 x 4. So one of w by a bits is
  counted as 0.2 pJ * w * a / 64.
- The products are added up as integers of 32 bits, as runtimes do: 0.1 pJ each.
- In float32 a multiplication takes 3.7 pJ and an addition 0.9 pJ. A layer that has not both weights
  and inputs on a grid computes in float32.
- Each multiplication fetches both of its operands, at their bits, from a memory of 8 KB beside the
  multiplier: 5 pJ for 32 bits. Sums stay in a register.
- A layer's weights and inputs are read from DRAM, and its outputs written there, once: 640 pJ for
  32 bits. They move at their bits, as in a device that is made for integers of such widths.

Nothing is counted for what is done between the layers, nor for the clock and for leakage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError, argument, shown
from ..models.base import Model
from ..quantization.inspection import FLOAT_BITS, LayerInfo, list_layers
from ..runtime.files import user_path
from .activations import Call, watch_activations

BYTE = 8


MULTIPLY_8_PJ = 0.2


ADD_32_PJ = 0.1


MULTIPLY_FLOAT_PJ = 3.7


ADD_FLOAT_PJ = 0.9


SRAM_32_PJ = 5.0


DRAM_32_PJ = 640.0


BESIDE = {".xml": ".bin"}
"""Of formats that keep the weights in a second file: its suffix."""


@dataclass(frozen=True)
class Figures:
    """What a layer or a network costs for one image.

    Attributes:
        macs: multiply-accumulates.
        bit_operations: weight bits * activation bits * MACs.
        disk_bytes: of the weights at their bits, packed without gaps; step sizes, biases and what
            is not a layer's are not counted.
        memory_bytes: of the weights as runtimes load them: a byte each up to 8 bits, else float32.
        activation_bytes: of a layer the most that all activations take together while it runs, of
            a network the most at any time (see `activations`).
        energy_joules: an estimate (see above).
    """

    macs: int
    bit_operations: int
    disk_bytes: int
    memory_bytes: int
    activation_bytes: int
    energy_joules: float

    def ratio(self, reference: Figures) -> dict[str, float | None]:
        """Each figure as a share of another's; None where that is 0."""
        pairs = zip(asdict(self).items(), asdict(reference).values(), strict=True)
        return {key: value / base if base else None for (key, value), base in pairs}


@dataclass(frozen=True)
class LayerCost:
    """One layer and its figures; `name`, `kind` and bits as `LayerInfo` has them."""

    name: str
    kind: str
    weight_bits: int
    activation_bits: int
    figures: Figures

    def to_dict(self) -> dict[str, Any]:
        row = asdict(self)
        figures = row.pop("figures")
        return {**row, **figures}


@dataclass(frozen=True)
class Cost:
    """What `dfq cost` shows of a detector or a run.

    Attributes:
        source, family: of the detector.
        image_size: side in pixels that it was counted for.
        layers: in execution order.
        total: of all of them.
        as_float: the same network without quantizers.
        peak_at: name of the module in which activations take most; "": in the network's own code.
    """

    source: str
    family: str
    image_size: int
    layers: Sequence[LayerCost]
    total: Figures
    as_float: Figures
    peak_at: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.source,
            "family": self.family,
            "image_size": self.image_size,
            "total": asdict(self.total),
            "float": asdict(self.as_float),
            "ratio": self.total.ratio(self.as_float),
            "activation_peak_at": self.peak_at,
            "layers": [layer.to_dict() for layer in self.layers],
        }


@dataclass(frozen=True)
class FileCost:
    """What `dfq cost` shows of an exported file: what it takes on disk, bytes."""

    source: str
    disk_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.source, "disk_bytes": self.disk_bytes}


def detector_cost(detector: Model, image_size: int) -> Cost:
    """What a detector costs for an image of so many pixels a side."""
    forward_pass = watch_activations(detector, image_size)
    alive, as_float = forward_pass.alive(), forward_pass.alive(as_float=True)
    layers, floats = [], []
    for row in list_layers(detector, image_size):
        weights = _weights(detector.module.get_submodule(row.name))
        calls = forward_pass.calls.get(row.name, [])
        layers.append(
            LayerCost(
                row.name,
                row.kind,
                row.weight_bits,
                row.activation_bits,
                _figures(row, weights, calls, alive),
            )
        )
        floats.append(_figures(row, weights, calls, as_float, as_float=True))
    peak = max(alive)
    return Cost(
        detector.source,
        detector.family,
        image_size,
        layers,
        _sum((layer.figures for layer in layers), peak),
        _sum(floats, max(as_float)),
        forward_pass.places[alive.index(peak)],
    )


def mac_energy(weight_bits: int, activation_bits: int) -> float:
    """Picojoules of one multiply-accumulate, without its operands' way from memory."""
    if max(weight_bits, activation_bits) == FLOAT_BITS:
        return MULTIPLY_FLOAT_PJ + ADD_FLOAT_PJ
    return MULTIPLY_8_PJ * weight_bits * activation_bits / 64 + ADD_32_PJ


def weight_memory(weights: int, bits: int) -> int:
    """Bytes of so many weights as runtimes load them."""
    return weights * (1 if bits <= BYTE else FLOAT_BITS // BYTE)


def _figures(
    row: LayerInfo,
    weights: int,
    calls: Sequence[Call],
    alive: Sequence[int],
    *,
    as_float: bool = False,
) -> Figures:
    """What one layer costs.

    Args:
        row: as it is listed.
        weights: how many it has.
        calls: of it, in one pass.
        alive: bytes of activations during each operation of that pass.
        as_float: count it without quantizers.
    """
    operands = (row.weight_bits, row.activation_bits)
    if as_float:
        operands = (FLOAT_BITS, FLOAT_BITS)
    moved = float(weights * operands[0])
    for call in calls:
        # A product has its left operand in the place of weights.
        widths = operands if row.kind == "matmul" else operands[1:] * len(call.inputs)
        moved += sum(n * bits for n, bits in zip(call.inputs, widths, strict=True))
        moved += sum(
            out.elements * (out.float_bits if as_float else out.bits) for out in call.outputs
        )
    picojoules = (
        row.macs * mac_energy(*operands)
        + row.macs * sum(operands) / 32 * SRAM_32_PJ
        + moved / 32 * DRAM_32_PJ
    )
    return Figures(
        macs=row.macs,
        bit_operations=row.macs * operands[0] * operands[1],
        disk_bytes=-(-weights * operands[0] // BYTE),
        memory_bytes=weight_memory(weights, operands[0]),
        activation_bytes=max(
            (max(alive[call.first : call.last + 1], default=0) for call in calls), default=0
        ),
        energy_joules=picojoules * 1e-12,
    )


def _sum(rows: Iterable[Figures], peak: int) -> Figures:
    rows = list(rows)
    return Figures(
        macs=sum(row.macs for row in rows),
        bit_operations=sum(row.bit_operations for row in rows),
        disk_bytes=sum(row.disk_bytes for row in rows),
        memory_bytes=sum(row.memory_bytes for row in rows),
        activation_bytes=peak,
        energy_joules=sum(row.energy_joules for row in rows),
    )


def _weights(layer: nn.Module) -> int:
    """How many weights a layer has, without its biases."""
    return sum(
        tensor.numel()
        for name, tensor in layer.named_parameters()
        if name.endswith("weight") and tensor.ndim > 1
    )


def file_cost(model: str | Path, image_size: int | None) -> FileCost:
    path = user_path(model)
    if image_size is not None:
        raise UserError(
            f"{argument('image-size', image_size)}: {shown(model)} is an exported file, of which "
            "the size on disk is all that is told; give the model or the run it was made from"
        )
    files = [path]
    if (weights_suffix := BESIDE.get(path.suffix.lower())) is not None:
        files.append(path.with_suffix(weights_suffix))
    for file in files:
        if not file.is_file():
            raise UserError(f"{shown(file)}: there is no such file; check the path")
        if not file.stat().st_size:
            raise UserError(f"{shown(file)}: is empty; export the model again")
    return FileCost(str(model), sum(file.stat().st_size for file in files))

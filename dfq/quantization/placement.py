"""Where quantizers stand, by runtime: one table for calibration, training, sensitivity and export.

A runtime computes in integers only what stands between grids as it expects them, and each expects
them elsewhere. What each needs was measured by counting the integer operations of its own optimised
graph (`benchmarks/runtimes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Runtime = Literal["onnxruntime", "openvino", "tensorrt", "litert"]
"""Runtimes that have a placement of their own."""


@dataclass(frozen=True)
class Placement:
    """Where quantizers stand besides weights and the inputs of layers.

    Attributes:
        outputs: on the output of every layer, before its activation function; else only where the
            output itself is added or concatenated.
        adds_and_concats: on the operands of sums and concatenations, and on their results.
        fused_sums: of a sum, the operand that was computed last stays as it is: the runtime adds
            the other one to it within the layer that gives it.
        one_grid: a concatenation has one grid for all operands and its result.
        averages: so has an average: a pooling, an enlargement between values.
        predictions: on the outputs of the layers that give the predictions too, each its own; what
            comes behind them stays in float.
        sigmoid_step: step of the grid, from zero, on the sigmoid within SiLU; None: SiLU is one
            function, in float.
        symmetric: activations have grids without a zero point.
        signed: integers of activations are int8, else uint8 (the same values, 128 apart).
        narrow_weights: integers of weights end at -127.
        most_bits: that activations may have.
        least_bits: that they may have.
    """

    outputs: bool = False
    adds_and_concats: bool = True
    fused_sums: bool = False
    one_grid: bool = False
    averages: bool = False
    predictions: bool = False
    sigmoid_step: float | None = None
    symmetric: bool = False
    signed: bool = False
    narrow_weights: bool = False
    most_bits: int = 16
    least_bits: int = 1


INPUTS = Placement(adds_and_concats=False)
"""Weights and inputs of layers alone."""

EVERYWHERE = Placement(outputs=True)

PLACEMENTS: dict[str, Placement] = {
    # A convolution is computed in integers only where its output is on a grid at once; the SiLU
    # behind it costs more in float than integers gain, unless its sigmoid is on a grid too. With
    # one grid a concatenation is a copy, and nothing is rounded a second time.
    "onnxruntime": Placement(outputs=True, one_grid=True, averages=True, sigmoid_step=1 / 255),
    # SiLU is part of the convolution; a grid in between would take it out.
    "openvino": Placement(fused_sums=True, one_grid=True),
    # Explicit quantization takes symmetric int8 only, and one scale across a concatenation.
    "tensorrt": Placement(
        fused_sums=True,
        one_grid=True,
        symmetric=True,
        signed=True,
        most_bits=8,
    ),
    # LOGISTIC has 1/256 for its output, CONCATENATION and averages one scale throughout, and no
    # convolution takes integers and gives floats; weights have no -128. Its kernels of 16 bits gave
    # other values than PyTorch, or were not to be had. With fewer than 8 its converter leaves out
    # the limits: values beyond them are not clipped.
    "litert": Placement(
        outputs=True,
        one_grid=True,
        averages=True,
        predictions=True,
        sigmoid_step=1 / 256,
        signed=True,
        narrow_weights=True,
        most_bits=8,
        least_bits=8,
    ),
}

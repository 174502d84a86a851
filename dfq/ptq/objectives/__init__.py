"""Objectives of block reconstruction: a file each; `METHODS` says how each method uses its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .block_error import block_error
from .bottom_elimination import bottom_elimination
from .fisher import fisher_error
from .mixed_granularity import mixed_granularity
from .prediction_difference import prediction_difference
from .similarity import similarity_preserving
from .step import Step as Step
from .task import task_guided

Objective = Callable[[Step], Tensor]


@dataclass(frozen=True)
class Method:
    """How a method reconstructs.

    Attributes:
        objective: what is minimised, a scalar; the rounding's regulariser comes on top.
        layers: each layer by itself, instead of each block.
        drop: probability that a value of the block's input, and of each activation in it, is the
            float one; 0: none is.
        scales: whether the step sizes of activations are learned along.
        biases: whether biases are learned along.
        correct: whether the float inputs are moved to where the BatchNorm statistics in the block
            are met (PD-Quant's Distribution Correction).
        fisher: whether it looks at the Fisher information.
        labels: whether it looks at the labels of the set.
        predictions: whether each step looks at the network's predictions.
        start: where rounding starts, "gptq" or "nearest".
        continuous: whether the weights themselves are learned, straight through rounding, and their
            step sizes, in place of rounding variables.
        progressive: parts of blocks come first, then blocks, then pairs of them (see `units`), each
            from the integers of the one before; in each, activations are quantized in the second
            half of the iterations alone.
    """

    objective: Objective
    layers: bool = False
    drop: float = 0.0
    scales: bool = True
    biases: bool = False
    correct: bool = False
    fisher: bool = False
    labels: bool = False
    predictions: bool = False
    start: str = "nearest"
    continuous: bool = False
    progressive: bool = False


METHODS: dict[str, Method] = {
    "adaround": Method(block_error, layers=True, scales=False),
    "adaquant": Method(block_error, layers=True, biases=True, continuous=True),
    "brecq": Method(fisher_error, fisher=True),
    "apq": Method(bottom_elimination, fisher=True),
    "qdrop": Method(block_error, drop=0.5),
    "pd": Method(prediction_difference, drop=0.5, correct=True, predictions=True),
    "spq": Method(similarity_preserving, predictions=True),
    "mgrq": Method(mixed_granularity, predictions=True),
    "pfcr": Method(block_error, progressive=True),
    "task": Method(task_guided, labels=True, predictions=True),
    "best": Method(fisher_error, drop=0.5, scales=False, biases=True, fisher=True, start="gptq"),
}

"""What an objective of block reconstruction sees in one iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...models.base import Model, Targets

Passes = Callable[[], Any]


@dataclass(frozen=True)
class Step:
    """One iteration on one batch; what takes a forward pass is a function, called at most once.

    Attributes:
        outputs: tensors that the quantized block gives, with gradients; rows by image, or by patch
            or proposal of one.
        float_outputs: what the float block gives in their place.
        unit: variance of the float block's outputs over the set, one number for each output.
            Squared errors are divided by it: the papers' weights are for networks whose features
            have a variance of about 1.
        images: how many there are in the batch.
        model: the quantized network, for what its predictions are.
        predictions: gives the predictions of the network whose blocks up to this one are quantized
            and whose others are float, with gradients.
        float_predictions: gives those of the float network.
        layers: gives, for each quantized layer in the block, its output and the float layer's.
        fisher: gives, for each output, the diagonal of the Fisher information, broadcastable.
        targets: the labels of the batch.
        image_shape: height and width in pixels.
    """

    outputs: list[Tensor]
    float_outputs: list[Tensor]
    unit: list[float]
    images: int
    model: Model
    predictions: Passes
    float_predictions: Passes
    layers: Callable[[], list[tuple[Tensor, Tensor]]]
    fisher: Callable[[], list[Tensor]]
    targets: Callable[[], Targets]
    image_shape: tuple[int, int]

"""The `distillation` section of a recipe: how the low-bit network is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ..runtime.limits import LARGEST_WEIGHT, MOST_IMAGES, MOST_STEPS
from ..runtime.settings import Section


class DistillationWeights(Section):
    """Weights of the training loss."""

    kl: float = Field(1.0, ge=0, le=LARGEST_WEIGHT)
    """Divergence from the teacher's predictions."""
    feature: float = Field(1.0, ge=0, le=LARGEST_WEIGHT)
    """Squared distance of the distilled layers, in the form `feature_form`."""
    task: float = Field(0.0, ge=0, le=LARGEST_WEIGHT)
    """The family's own training loss on the synthetic labels."""


class Distillation(Section):
    """Stage II: how the low-bit network is trained."""

    epochs: int = Field(6, ge=1, le=MOST_STEPS)
    """Passes over the set."""
    batch_size: int = Field(16, ge=1, le=MOST_IMAGES)
    """Images a step."""
    lr: float = Field(3e-4, gt=0)
    """Adam, biases and whatever is not quantized; cosine to zero."""
    weight_lr: float | None = Field(0.0, ge=0)
    """Adam, quantized weights: 0 keeps the integers they were rounded to, and trains step sizes and
    biases alone; None: `lr`."""
    train_last: bool = True
    """With a `weight_lr` of 0, weights of 8 bits in layers that give the predictions are trained
    all the same, at `lr`."""
    scale_lr: float = Field(1e-3, gt=0)
    """Adam, logarithms of the step sizes; cosine to zero."""
    zero_lr: float = Field(0.0, ge=0, le=1)
    """Adam, zero points of activations, in widths of their grid; cosine to zero. 0: they stay where
    calibration put them, which keeps as much."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the rates rise from zero."""
    weights: DistillationWeights = DistillationWeights()
    kl_form: Literal["family", "flattened"] = "family"
    """family: over what is a distribution in the family's head; flattened: the paper's softmax over
    a whole level."""
    feature_form: Literal["relative", "absolute"] = "relative"
    """relative: squared distances of the outputs of blocks, each relative to the teacher's
    variance; absolute: the paper's, of all convolutions and BatchNorms, in units."""
    temperature: float = Field(1.0, gt=0, le=LARGEST_WEIGHT)
    """Softens the divergence; the paper's flattened form uses 4."""
    clip: float = Field(10.0, gt=0, le=LARGEST_WEIGHT)
    """Largest norm of the gradient."""
    ema: float = Field(0.998, ge=0, lt=1)
    """Decay of the averaged weights; 0 switches them off."""
    selection: Literal["ema", "last", "agreement"] = "ema"
    """Which weights are kept; agreement: those closest to the teacher on the set."""
    select_on: str | None = None
    """A labelled real set: the epoch with the highest AP on it is kept, as the paper does. The run
    is then not data-free, and says so."""
    keep_worse: bool = False
    """With `method: qat`, what was trained is kept even where the calibrated start is better."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability that an image is mirrored, labels too."""
    zoom: float = Field(0.0, ge=0, lt=1)
    """Images are enlarged or shrunk at random by up to this share, labels too."""
    mosaic: float = Field(0.0, ge=0, le=1)
    """Probability that a batch is made into mosaics of four images at half their size."""
    colour: float = Field(0.0, ge=0, lt=1)
    """Channels are scaled and shifted at random by up to this share."""
    camera: float = Field(0.0, ge=0, le=1)
    """Images are pictured by random cameras of up to this strength: blur, exposure, white balance,
    noise and JPEG. At 1: a blur of 1.5 pixels, a stop, 4000 to 9000 K, noise of 0.05, and a quality
    of 35 %, at most."""
    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    """What convolutions compute in while training; quantizers, losses and parameters stay in
    float32. Auto: bfloat16 where the device computes in it natively."""
    checkpoint_minutes: float = Field(1.0, ge=0, le=LARGEST_WEIGHT)
    """A checkpoint is written at the first epoch's end after so many minutes."""

    @field_validator("weight_lr")
    @classmethod
    def _zero_or_none(cls, value: float | None) -> float | None:
        if value:
            raise ValueError(
                "rates in quantization steps were removed; should be 0 (integers stay as rounded) "
                "or null (weights are trained at distillation.lr)"
            )
        return value

"""The `synthesis` section of a recipe: how images and labels are made."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..runtime.label_sets import label_set
from ..runtime.limits import (
    LARGEST_RATE,
    LARGEST_SIDE,
    LARGEST_WEIGHT,
    MOST_IMAGES,
    MOST_OBJECTS,
    MOST_STEPS,
)
from ..runtime.settings import Section

LABELS = ("adaptive", "single", "multi", "tile", "none")
"""What `synthesis.labels` can be, besides one of `SET_LABELS` with a set behind it."""


class SynthesisWeights(Section):
    """Weights of the synthesis loss; what they mean, `synthesis.balance` says."""

    task: float = Field(1.0, ge=0, le=LARGEST_WEIGHT)
    """The family's own training loss on the labels."""
    bn: float = Field(1.0, ge=0, le=LARGEST_WEIGHT)
    """BatchNorm statistics, summed over the layers."""
    first_bn: float = Field(5.0, ge=0, le=LARGEST_WEIGHT)
    """How often more the first BatchNorm counts in that sum: it fixes colours and contrast."""
    entropy: float = Field(1.0, ge=0, le=LARGEST_WEIGHT)
    """Entropy of the similarities between patches, in networks with attention: of its mean over the
    blocks; of the sum over them with factors of the losses (the paper's)."""
    tv: float = Field(0.05, ge=0, le=LARGEST_WEIGHT)
    """Total variation, relative to the gradient of the others."""
    l2: float = Field(0.0, ge=0, le=LARGEST_WEIGHT)
    """L2 norm of an image, relative to the gradient of the others: the further from black, the
    more it counts."""


class LabelStage(Section):
    """The low-resolution stage in which the adaptive sampler finds boxes and categories."""

    image_size: int = Field(160, ge=32, le=LARGEST_SIDE)
    """Side in pixels."""
    iterations: int = Field(80, ge=1, le=MOST_STEPS)
    """Steps of this stage."""
    start: float = Field(0.5, ge=0, le=1)
    """Share of the iterations after which labels are first updated."""
    stop: float = Field(0.95, ge=0, le=1)
    """Share of the iterations after which labels stay fixed."""
    updates: int = Field(4, ge=1, le=MOST_STEPS)
    """How often labels are updated in between."""
    score_threshold: float = Field(0.2, gt=0, lt=1)
    """Detections below this score do not count."""
    sampler: Literal["scattered", "paper"] = "scattered"
    """scattered: labels begin as many objects of all sizes, whose categories follow what the
    detector faintly sees at the first update; paper: as one of 20 to 80 % of the side, and updates
    drop what they do not find."""
    objects: int = Field(32, ge=1, le=MOST_OBJECTS)
    """Most objects an image begins with, where they are scattered."""
    smallest_area: float = Field(0.0016, gt=0, lt=0.8)
    """Share of the image below which no object begins, and no detection is added."""

    @model_validator(mode="after")
    def _in_order(self) -> LabelStage:
        if self.start > self.stop:
            raise ValueError(f"start ({self.start:g}) is after stop ({self.stop:g})")
        return self


class Techniques(Section):
    """Variants of the optimisation; all off unless set."""

    swing: bool = False
    """Strided convolutions see their input shifted at random by less than their stride."""


class Synthesis(Section):
    """Stage I: how images and labels are made."""

    images: int = Field(512, ge=1, le=MOST_IMAGES)
    """How many images are made."""
    image_size: int | None = Field(None, ge=32, le=LARGEST_SIDE)
    """Side in pixels; None: the size the detector was trained for."""
    iterations: int = Field(200, ge=0, le=MOST_STEPS)
    """Of the image stage; 0 leaves the initial noise (a baseline)."""
    batch_size: int = Field(32, ge=1, le=MOST_IMAGES)
    """Images optimised together; BatchNorm statistics are matched over the batch."""
    micro_batch: int | None = Field(None, ge=1, le=MOST_IMAGES)
    """Images that go through the network at once, for less memory in more passes; the statistics
    stay those of the whole batch. None: all."""
    learning_rate: float = Field(0.05, gt=0, le=LARGEST_RATE)
    """Adam's rate on the pixels, cosine to zero; halved once the images are enlarged."""
    labels: str = "adaptive"
    """adaptive, single, multi, tile, none; real:SET, which takes the labels of a real set; or
    multi:SET, tile:SET, whose objects are as frequent and as large as the set's."""
    init: Literal["uniform", "gaussian", "pink"] = "uniform"
    """Noise the images start from; pink: of low frequencies more, as photographs have."""
    multires: float = Field(0.55, ge=0, lt=1)
    """Share of the iterations spent at half the size before the images are enlarged; 0: none."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability that an image is mirrored, labels too, in an iteration."""
    erase: float = Field(0.5, ge=0, le=1)
    """Probability that a rectangle (2 to 20 % of the area) is blanked in an iteration."""
    settle: float = Field(0.6, ge=0, le=1)
    """Share of the iterations at full size, the last ones, without erasing, total variation and
    image norm and with a tenth of the task's weight: images then come to meet the statistics. 0:
    none."""
    scales: int = Field(4, ge=0, le=8)
    """Coarser grids on which images are optimised beside the pixels, each half as fine as the one
    before. 0: the pixels alone (the paper's)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the convolutions; auto: bfloat16 where the device computes in it natively."""
    balance: Literal["gradient", "loss"] = "gradient"
    """gradient: weights are shares of the gradient, which hold for every network, batch and image
    size; loss: they are factors of the losses (the paper's), to be found anew for each."""
    bn_form: Literal["gaussian", "relative", "absolute"] = "gaussian"
    """How far a BatchNorm's input is from the training data's. gaussian: the divergence of
    Gaussians with the channels' means and variances, of which the worst layers count most;
    relative: the sum over the layers of distances of both in units of each channel's spread;
    absolute: these distances as they are (the paper's)."""
    masks: Literal["ellipse", "own", "none"] = "ellipse"
    """What the mask loss of a label compares with, in networks with masks, in synthesis and
    training. ellipse: the one in its box; own: the network's own mask; none: boxes only."""
    weights: SynthesisWeights = SynthesisWeights()
    label_stage: LabelStage = LabelStage()
    techniques: Techniques = Techniques()

    @field_validator("labels")
    @classmethod
    def _known_labels(cls, value: str) -> str:
        # Whether the set is there shows when it is opened: a recipe outlives it.
        kind_and_source = label_set(value)
        if value not in LABELS and not (kind_and_source and kind_and_source[1]):
            *drawn, none = LABELS
            names = ", ".join(f"'{name}'" for name in (*drawn, "multi:SET", "tile:SET", none))
            raise ValueError(f"should be {names} or 'real:SET'")
        return value

    @model_validator(mode="after")
    def _whole_batches(self) -> Synthesis:
        if self.micro_batch is not None and self.techniques.swing:
            # It moves the images differently in each pass.
            raise ValueError("techniques.swing and micro_batch cannot go together")
        return self


FORMER: dict[str, Any] = {
    "label_stage.reuse": False,
    "techniques.low_pass": 0.0,
    "techniques.zoom": 0.0,
    "techniques.soft_labels": 0.0,
    "techniques.slack": 0.0,
    "techniques.emphasis": 0.0,
    "techniques.per_image": 0.0,
}
"""Keys that this section had once, with the value with which each changed nothing."""


def as_recorded(settings: Synthesis) -> dict[str, Any]:
    """Settings as sets record them: with the keys that sets of earlier versions have, so that a set
    made before is known for what it is."""
    values = settings.model_dump(mode="json")
    for key, nothing in FORMER.items():
        section, _, name = key.partition(".")
        values[section][name] = nothing
    return values

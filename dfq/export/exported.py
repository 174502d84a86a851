"""An exported model: a file that a runtime executes, and what it says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import UserError, shown
from ..models.base import Detections, check_side
from ..models.classifying import Preprocessing
from ..models.detecting import Task

Format = Literal["onnx", "openvino", "litert", "torch"]

FORMATS: tuple[str, ...] = get_args(Format)

RUNTIMES: dict[str, tuple[str, ...]] = {
    "onnx": ("onnxruntime", "openvino", "tensorrt"),
    "openvino": ("openvino",),
    "litert": ("litert",),
    "torch": ("torch", "onnxruntime", "openvino", "tensorrt", "litert"),
}
"""Runtimes that execute a format, the usual one first."""
SUFFIXES: dict[str, str] = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "litert": ".tflite",
    "torch": ".pt2",
}
"""How files of each format end."""

LOGITS = "logits"
"""The one output of a classifier's file."""

Runtime = Literal["onnxruntime", "openvino", "tensorrt", "litert", "torch"]


class ExportInfo(BaseModel):
    """What an exported file says of itself, as one JSON text in the file's own metadata.

    Attributes:
        format, runtime: of the file, and whose placement its grids follow.
        family: of the model, as `Model.family`.
        names: category names by index.
        image_size: side in pixels that it was exported for; the graph takes any multiple of
            `stride` where `dynamic` is set, else this side alone.
        stride: image sides are multiples of it.
        batch: images a call takes; None: any number.
        weight_bits, activation_bits: 32 for a float file.
        precision: in words, as "W8A8" or "float32".
        checkpoint: sha256 of the file that the float model came from.
        model_sha256: of the run's model; None: exported from a float model.
        ranges: sha256 of the images that ranges were found on; None: they are the run's own.
        source: what the user named, without its folders.
        letterbox: how images get to the network's size; a classifier's are cut.
        normalisation: what the graph does itself; images are RGB in [0, 1], float32.
        outputs: name of each output and what it holds.
        parts: of a two-stage detector: what lies beside in files of its own, `FILE.heads.onnx`.
        part: which of those the file is.
        nms: the score below which the NMS within the file leaves detections out; None: there is
            none within it.
        spec: `Model.spec()`, from which a family's decoding is rebuilt.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: Literal["dfq exported detector"] = "dfq exported detector"
    version: Literal[1] = 1
    format: Format
    runtime: Runtime
    family: str
    names: list[str]
    image_size: int
    stride: int
    dynamic: bool = False
    batch: int | None = None
    weight_bits: int = 32
    activation_bits: int = 32
    precision: str
    checkpoint: str
    model_sha256: str | None = None
    ranges: str | None = None
    source: str
    letterbox: str
    normalisation: str
    outputs: dict[str, str]
    parts: list[str] = []
    part: str | None = None
    nms: float | None = None
    spec: dict[str, Any]

    @property
    def task(self) -> Task:
        """What the file is for, as its outputs tell."""
        return "classification" if set(self.outputs) == {LOGITS} else "detection"


class ExportedModel(ABC):
    """A file opened in its runtime.

    Attributes:
        task: what it is for.
        path: of the file.
        info: what the file says of itself.
    """

    task: Task
    path: Path
    info: ExportInfo

    @property
    def names(self) -> list[str]:
        """Category names by index."""
        return self.info.names

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.info.image_size

    @property
    def stride(self) -> int:
        """Image sides are multiples of it."""
        return self.info.stride

    @property
    def source(self) -> str:
        """For messages."""
        return str(self.path)

    @property
    def device(self) -> torch.device:
        """Runtimes take images from the CPU."""
        return torch.device("cpu")

    @property
    def fixed_batch(self) -> int | None:
        """Images that a call takes, no more and no fewer; None: any number."""
        return self.info.batch

    def check_size(self, size: int, key: str = "image size") -> None:
        """Refuse a side in pixels that the file cannot take.

        Args:
            size: the side.
            key: what the user set it by, for the message.

        Raises:
            UserError: it is another than the file's only one, or no multiple of the stride.
        """
        if not self.info.dynamic and size != self.image_size:
            raise UserError(
                f"{key}: {size} is not what {shown(self.path)} was exported for, which is "
                f"{self.image_size} alone; leave it out, or export another file"
            )
        check_side(size, self.stride, key)

    @abstractmethod
    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The file's outputs by name.

        Args:
            images: float32 `(n, 3, h, w)`, RGB in [0, 1], letterboxed or cut.
        """

    def as_input(self, images: np.ndarray) -> np.ndarray:
        """Images, as for `run`, with the values that the graph takes: what dfq wrote normalises
        them itself."""
        return images


class ExportedDetector(ExportedModel):
    """A file opened in its runtime, which detects as a `Detector` does."""

    task: Task = "detection"

    @property
    def has_masks(self) -> bool:
        """Whether it predicts instance masks: most exported files do not."""
        return False

    @abstractmethod
    def detect(self, images: Tensor, *, masks: bool = False, **thresholds: Any) -> list[Detections]:
        """Detections for images `(n, 3, h, w)` in [0, 1], one per image, as `Detector.detect`;
        `masks` is for its sake alone."""


class ExportedClassifier(ExportedModel):
    """A file opened in its runtime, which classifies as a `Classifier` does."""

    task: Task = "classification"

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """How images are resized and cut for it."""

    @abstractmethod
    def classify(self, images: Tensor) -> Tensor:
        """Logits, float32 `(n, classes)`, of images `(n, 3, h, w)` in [0, 1]."""

"""An exported file that is none: a detector of this process behind the interface of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfq.export.exported import ExportedDetector, ExportInfo
from dfq.models.base import Detections, Detector


class ExportedDouble(ExportedDetector):
    """Takes only what its file says: a side of its own, and just so many images.

    Attributes:
        batches: how many images each call was given.
    """

    def __init__(
        self, path: Path, detector: Detector, *, batch: int | None = None, dynamic: bool = False
    ) -> None:
        self.path = path
        self.detector = detector
        self.batches: list[int] = []
        self.info = ExportInfo(
            format="onnx",
            runtime="onnxruntime",
            family=detector.family,
            names=detector.names,
            image_size=detector.image_size,
            stride=detector.stride,
            dynamic=dynamic,
            batch=batch,
            precision="float32",
            checkpoint=detector.fingerprint,
            source=detector.source,
            letterbox="centred",
            normalisation="none",
            outputs={},
            spec={},
        )

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def detect(self, images: Tensor, *, masks: bool = False, **thresholds: Any) -> list[Detections]:
        assert images.dtype == torch.float32
        assert images.device == self.device
        sides = set(images.shape[2:])
        assert self.info.dynamic or sides == {self.info.image_size}
        assert len(images) == (self.info.batch or len(images))
        self.batches.append(len(images))
        return self.detector.detect(images, **thresholds)

"""Exports of dfq's as models: their runtime's outputs, made boxes of or taken for logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, shown
from ..models import from_spec, require_detector
from ..models.base import Detections, Detector
from ..models.classifying import Preprocessing
from .exported import LOGITS, ExportedClassifier, ExportedDetector, ExportedModel, ExportInfo
from .opening import RuntimeFile, open_file
from .suppression import MOST, detections
from .writers import path_of_part


def open_exported(
    path: str | Path, *, threads: int | None = None, trust: bool = False
) -> ExportedModel:
    """Open an export of dfq's in the runtime of its format.

    Args:
        path, threads, trust: as for `open_file`.

    Raises:
        UserError: as `open_file`, and for a file that is no export of dfq's.
    """
    file = open_file(path, threads=threads, trust=trust)
    if file.says is None:
        raise UserError(
            f"{shown(path)}: is no export of dfq (it says nothing of itself); `dfq verify` takes "
            "such files"
        )
    if file.says.part is not None:
        raise UserError(
            f"{shown(path)}: is the part '{file.says.part}' of a model; name the file without it"
        )
    return as_model(file, file.says, threads, trust)


def as_model(
    file: RuntimeFile, info: ExportInfo, threads: int | None = None, trust: bool = False
) -> OpenedDetector | OpenedClassifier:
    """What an opened file of dfq's is.

    Args:
        file: opened.
        info: what it says of itself.
        threads, trust: as for `open_file`, of the files beside it.
    """
    if info.task == "classification":
        return OpenedClassifier(file, info)
    return OpenedDetector(file, info, open_parts(file.path, info, threads, trust))


class _Opened(ExportedModel):
    """An export of dfq's in its runtime."""

    def __init__(self, file: RuntimeFile, info: ExportInfo) -> None:
        self.file, self.info, self.path = file, info, file.path

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        batch, count = self.info.batch, len(images)
        if batch is None or count == batch:
            return self.file.run(images)
        # Filled up with black images to as many as the file takes at once.
        filled = np.zeros((-count % batch, *images.shape[1:]), images.dtype)
        images = np.concatenate([images, filled])
        rows = [self.file.run(images[i : i + batch]) for i in range(0, len(images), batch)]
        return self._joined(rows, batch, count)

    def _joined(
        self, rows: list[dict[str, np.ndarray]], batch: int, count: int
    ) -> dict[str, np.ndarray]:
        """The outputs of several calls of `batch` images as those of `count` images."""
        return {name: np.concatenate([row[name] for row in rows])[:count] for name in rows[0]}


class OpenedClassifier(_Opened, ExportedClassifier):
    """A classifier's file in its runtime; it normalises images itself."""

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        stated = self.info.spec.get("preprocessing")
        if not isinstance(stated, dict):
            raise UserError(
                f"{shown(self.path)}: what it says of itself is damaged (at 'preprocessing'); "
                "export it again"
            )
        return Preprocessing(self.image_size).changed(stated, str(self.path))

    def classify(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.run(images.detach().cpu().numpy())[LOGITS]).float()


class OpenedDetector(_Opened, ExportedDetector):
    """A detector's file in its runtime, with the files beside it."""

    def __init__(
        self, file: RuntimeFile, info: ExportInfo, parts: Mapping[str, RuntimeFile]
    ) -> None:
        super().__init__(file, info)
        self.parts = dict(parts)

    @property
    def has_masks(self) -> bool:
        return "masks" in self.parts

    @functools.cached_property
    def _family(self) -> Detector:
        """For its decoding; its weights are random."""
        family = require_detector(from_spec(self.info.spec))
        family.runners.update({name: _runner(part) for name, part in self.parts.items()})
        return family

    def _joined(
        self, rows: list[dict[str, np.ndarray]], batch: int, count: int
    ) -> dict[str, np.ndarray]:
        if self.info.nms is not None:
            for number, row in enumerate(rows):
                row["images_of"] = row["images_of"] + number * batch
            count = sum(len(row["scores"]) for row in rows)
        return super()._joined(rows, batch, count)

    def detect(self, images: Tensor, *, masks: bool = False, **thresholds: Any) -> list[Detections]:
        arrays = self.run(images.detach().cpu().numpy())
        if self.info.nms is not None:
            least, most = thresholds.get("score_threshold", 0.0), thresholds.get("max_detections")
            return detections(arrays, len(images), max(least, self.info.nms), most or MOST)
        outputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        shape = (images.shape[2], images.shape[3])
        if masks and self.has_masks:
            thresholds["masks"] = True
        return self._family.from_outputs(outputs, shape, **thresholds)


def _runner(file: RuntimeFile) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A part's file as a function of tensors `(k, ...)`."""

    def run(pooled: Tensor) -> tuple[Tensor, ...]:
        rows = pooled.detach().float().cpu().contiguous().numpy()
        # Runtimes do not all take none.
        outputs = file.run(rows if len(rows) else np.zeros((1, *rows.shape[1:]), rows.dtype))
        return tuple(torch.from_numpy(array)[: len(rows)] for array in outputs.values())

    return run


def open_parts(
    path: Path, info: ExportInfo, threads: int | None, trust: bool
) -> dict[str, RuntimeFile]:
    """The files that lie beside one of a two-stage detector."""
    parts = {}
    for name in info.parts:
        beside = path_of_part(path, name)
        if not beside.is_file():
            raise UserError(f"{shown(path)}: belongs with {shown(beside)}, which is not there")
        parts[name] = open_file(beside, threads=threads, trust=trust)
        says = parts[name].says
        same = ("checkpoint", "model_sha256", "runtime", "precision", "image_size")
        if (
            says is None
            or says.part != name
            or any(getattr(says, key) != getattr(info, key) for key in same)
        ):
            raise UserError(f"{shown(beside)}: is no part of {shown(path)}; export them again")
    return parts

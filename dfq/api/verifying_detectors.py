"""How `dfq verify` compares files of detectors: by their boxes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.image_set import ImageSet
from ..data.letterbox import load_letterboxed
from ..data.readers import open_set
from ..errors import UserError, shown
from ..evaluation.agreement import kept_of, pseudo_labelled
from ..evaluation.bootstrap import bootstrap_difference
from ..evaluation.coco import predict, score
from ..export import faults
from ..export.exported import ExportedModel
from ..export.layouts import ForeignModel, candidates
from ..export.movement import moved
from ..export.opening import RuntimeFile
from ..export.verify import DetectionAccuracy, Verification
from ..models.base import Detecting, Detections
from ..runtime.progress import Progress
from .verifying import DIAGNOSIS_IMAGES, Compared, Comparing, Origin, said_of, scenes


class ComparingDetectors(Comparing):
    """By detections: where they are, of what category, how sure."""

    def foreign(self, file: RuntimeFile, like: Any | None) -> ForeignModel:
        if like is None:
            return ForeignModel(file, None, None)
        return ForeignModel(file, list(like.names), like.image_size)

    @contextlib.contextmanager
    def images(
        self, data: str | Path | None, origin: Origin, model: ExportedModel
    ) -> Iterator[tuple[ImageSet, str]]:
        if data is not None:
            yield open_set(data), shown(data)
            return
        for folder in origin.sets:
            # What a run was made on may have changed since.
            with contextlib.suppress(UserError):
                some = open_set(folder).head(DIAGNOSIS_IMAGES)
                break
        else:
            with scenes(model.image_size) as (drawn, said):
                yield open_set(drawn), said
            return
        yield some, said_of(folder)

    def few(self, images: ImageSet, count: int, model: ExportedModel) -> np.ndarray:
        some = images.head(count)
        pixels, _, _ = load_letterboxed(some, range(len(some)), model.image_size, model.stride)
        return pixels.numpy()

    def compare(
        self,
        verification: Verification,
        model: Any,
        compared: Compared,
        images: ImageSet,
        named: bool,
        told: Progress,
    ) -> None:
        size = model.image_size

        def detections(detecting: Detecting, name: str) -> list[Detections]:
            detecting.check_size(size)
            with told.task(f"detection ({name})", len(images), "images") as task:
                return predict(detecting, images, image_size=size, progress=task.update)

        names = list(compared.other.names)
        ours = detections(model, "file")
        theirs = detections(compared.other, compared.words)
        verification.moved = moved(theirs, ours, names, compared.words)
        if not named:
            return
        if not images.labelled:
            agreement = kept_of(theirs, ours).to_dict()
            labelled = pseudo_labelled(images, theirs, len(names))
            agreement["AP"] = _ap(labelled, ours, labelled.names) if agreement["objects"] else None
            verification.accuracy = DetectionAccuracy(
                verification.images, len(images), agreement=agreement
            )
            return
        if names == [str(index) for index in range(len(names))] != images.names:
            # Neither file says what its categories are: the set's, where there are as many.
            if len(images.names) != len(names):
                verification.notes.append(
                    "AP: not measured, as neither file names its categories, and "
                    f"{verification.images} has {len(images.names)} where they have {len(names)}"
                )
                return
            names = list(images.names)
        images.category_mapping(names)
        of_float = of_reference = between = None
        if compared.model is not None:
            of_float = _ap(images, theirs, names)
        if compared.reference is not None:
            again = theirs
            if compared.origin.manifest is not None:
                again = detections(compared.reference, "PyTorch")  # type: ignore[arg-type]
            of_reference = _ap(images, again, names)
            if len(images) > 1:
                between = bootstrap_difference(images, ours, again, names)
        verification.accuracy = DetectionAccuracy(
            verification.images, len(images), _ap(images, ours, names),
            of_reference, of_float, between,
        )  # fmt: skip

    def faults(
        self, verification: Verification, model: Any, compared: Compared, few: np.ndarray
    ) -> list[str]:
        if "scores" not in model.info.outputs and not isinstance(model, ForeignModel):
            return []
        within = candidates(model.run(few), len(compared.origin.model.names), model.image_size)
        if within is None:
            return []
        return faults.of_scores(within, _best(compared.other, few))


def _ap(images: ImageSet, detections: list[Detections], names: list[str]) -> float | None:
    """COCO AP; None where there is nothing to find."""
    value = score(images, detections, names).AP
    return None if math.isnan(value) else value


def _best(detecting: Detecting, images: np.ndarray) -> float:
    """The highest score of a model in images."""
    rows = [detecting.detect(torch.from_numpy(image[None]))[0].scores for image in images]
    return max((float(row.max()) for row in rows if len(row)), default=0.0)

"""What `dfq verify` compares a file with, and how: that depends on the task."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.calibration_set import CalibrationSet
from ..errors import UserError, shown
from ..export.exported import ExportedModel, ExportInfo
from ..export.opening import RuntimeFile
from ..export.verify import Verification
from ..models.base import Model, Predicting
from ..runs.set_cache import origin_of, sets_of, sets_of_run
from ..runtime.progress import Progress

DIAGNOSIS_IMAGES = 64
"""Without images named."""

MADE_UP = 16


@dataclass(frozen=True)
class Origin:
    """What a file is compared with.

    Attributes:
        model: the run's or the float model.
        folder, manifest: of the run; None for a float model.
        checkpoint: sha256 of the float model's file; None where it is no model of dfq's.
    """

    model: Predicting
    folder: Path | None = None
    manifest: dict[str, Any] | None = None
    checkpoint: str | None = None

    @property
    def sets(self) -> list[Path]:
        """Images that there are for it, see `sets_of_run`."""
        return (
            sets_of(self.checkpoint or "") if self.manifest is None else sets_of_run(self.manifest)
        )

    def is_source_of(self, info: ExportInfo) -> bool:
        """Whether the file was exported from this very model."""
        model = None if self.manifest is None else self.manifest["model_sha256"]
        return self.checkpoint == info.checkpoint and info.model_sha256 == model

    def float_model(self, trust: bool) -> Predicting | None:
        """The float model, where it is at hand."""
        if self.manifest is None:
            return self.model
        for folder in self.sets:
            with contextlib.suppress(UserError):
                return origin_of(folder).load(trust=trust, device="cpu")
        return None


@dataclass(frozen=True)
class Compared:
    """What a file is compared with, loaded.

    Attributes:
        origin: what the user named.
        model: the float model, where it is at hand; None: the run stands for it.
        reference: the program that the file was lowered from; None where there is none.
    """

    origin: Origin
    model: Any
    reference: Model | None

    @property
    def other(self) -> Any:
        """The float model, or the run in its place."""
        return self.model or self.origin.model

    @property
    def words(self) -> str:
        """What `other` is, for people."""
        return "run in PyTorch" if self.model is None else "float model"


class Comparing(ABC):
    """How files of models of a task are compared."""

    @abstractmethod
    def foreign(self, file: RuntimeFile, like: Any | None) -> ExportedModel:
        """Anyone's file as a model.

        Args:
            file: opened.
            like: the model that it is compared with; None: it is what others are compared with.

        Raises:
            UserError: it is of no model of this task, or of another than `like`.
        """

    @abstractmethod
    def images(
        self, data: str | Path | None, origin: Origin, model: ExportedModel
    ) -> contextlib.AbstractContextManager[tuple[Any, str]]:
        """Images to compare on, and what they are.

        Args:
            data: what the user named; None: synthetic ones of the cache, or drawn ones.
            origin: what the file is compared with.
            model: the file.
        """

    @abstractmethod
    def few(self, images: Any, count: int, model: ExportedModel) -> np.ndarray:
        """The first `count` of the images as the file takes them: float32 `(n, 3, h, w)` in
        [0, 1]."""

    @abstractmethod
    def compare(
        self,
        verification: Verification,
        model: Any,
        compared: Compared,
        images: Any,
        named: bool,
        told: Progress,
    ) -> None:
        """Fill in `moved` and, where the user named the images, `accuracy`."""

    @abstractmethod
    def faults(
        self, verification: Verification, model: Any, compared: Compared, few: np.ndarray
    ) -> list[str]:
        """Faults that only files of this task have."""


def said_of(folder: Path) -> str:
    """What images nobody named are, for people."""
    if CalibrationSet.is_one(folder):
        return f"synthetic images of {shown(folder)}"
    return f"images of {shown(folder)}, which the run was made on"


@contextlib.contextmanager
def scenes(size: int) -> Iterator[tuple[Path, str]]:
    """A folder of drawn images, as long as it is used, and what they are."""
    import tempfile

    from ..demo.scenes import write_coco

    with tempfile.TemporaryDirectory() as folder:
        write_coco(Path(folder), MADE_UP, size)
        said = "drawn shapes, as no set of this network is in the cache: give --data for more"
        yield Path(folder), said

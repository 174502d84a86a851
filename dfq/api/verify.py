"""`dfq verify`: an exported file against the run or the float model that it comes from."""

from __future__ import annotations

import contextlib
import math
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.image_set import ImageSet
from ..data.letterbox import load_letterboxed
from ..data.readers import open_set
from ..errors import UserError, argument, shown
from ..evaluation.agreement import kept_of, pseudo_labelled
from ..evaluation.bootstrap import bootstrap_difference
from ..evaluation.coco import predict, score
from ..export import faults
from ..export.counting import count
from ..export.exported import ExportedModel, ExportInfo
from ..export.layouts import ForeignModel, candidates
from ..export.movement import moved, same_number
from ..export.opening import (
    Opened,
    OpenVinoFile,
    RuntimeFile,
    is_exported,
    open_exported,
    open_file,
    open_parts,
)
from ..export.ranges import fits
from ..export.reference import parity_of
from ..export.replacing import is_placed_for, place_for
from ..export.verify import Accuracy, Verification, worst
from ..graph.fold_batchnorm import fold
from ..models import require_detector
from ..models.base import Detecting, Detections, Detector
from ..quantization.policy import Policy
from ..runs.folder import check_run, is_run, load_run
from ..runs.loading import load_float
from ..runs.set_cache import origin_of, sets_of
from ..runtime.files import reason, user_path, write_json
from ..runtime.progress import Progress
from ..runtime.surroundings import Report, reporter
from .export import digest_of, range_images

PARITY_IMAGES = 8
DIAGNOSIS_IMAGES = 64
"""Without images named."""

MADE_UP = 16
_RANGE_IMAGES = 8


def verify(
    file: str | Path,
    against: str | Path | Detector,
    *,
    data: str | Path | None = None,
    max_drop: float = 0.003,
    threads: int | None = None,
    trust: bool = False,
    progress: Report = None,
) -> Verification:
    """Whether a file computes what it should, in integers, and where not, why.

    Args:
        file: an export of dfq's, or anyone's detection file: `.onnx`, `.xml`, `.tflite`, `.pt2`.
        against: the run's folder that it was exported from; or a float model: what names a
            detector, or a float file. What is found is also written into a run's folder, as
            `exports/<file name>.verify.json`.
        data: images to compare on, with labels or without; None: the network's set in the cache,
            else some that are made up.
        max_drop: AP that the file may be below its run in PyTorch.
        threads: that the runtime may use; None: its own choice.
        trust: run what is in a checkpoint.
        progress: told how far it is.

    Returns:
        What was found; `faults` is empty where the file is good.

    Raises:
        UserError: for anything the user can mend; the file and the model do not belong together.

    Example:
        >>> dfq.verify("demo.onnx", "run", data="set").file
        'demo.onnx'
    """
    told = reporter(progress)
    opened = _open(user_path(file), threads, trust)
    origin = _origin(against, trust)
    info = opened.says
    notes: list[str] = []
    counted = count(opened)
    if info is not None and info.weight_bits == 32 and counted.share_of_macs > 0:
        notes.append("quantized by another tool after dfq wrote it in float")
        info = None
    if info is not None:
        _require_same(opened.path, info, origin)
    model = _as_model(opened, info, origin)
    words = ["dfq", "verify", str(file), "--against", str(origin.detecting.source)]
    verification = Verification(
        file=shown(opened.path.name),
        format=model.info.format,
        runtime=opened.runtime,
        size_bytes=_size(opened.path),
        precision=info.precision if info else "INT8" if counted.share_of_macs else "float",
        against=shown(origin.detecting.source),
        images="",
        integers=counted,
        command=shlex.join([*words, *(["--data", str(data)] if data is not None else [])]),
        notes=notes,
    )
    with contextlib.ExitStack() as stack:
        images, verification.images = stack.enter_context(_images(data, origin, model.image_size))
        few = _letterboxed(images.head(PARITY_IMAGES), model)
        reference = None
        if info is not None and origin.is_source_of(info):
            reference = _reference(info, origin, data, notes)
        if reference is not None and info is not None:
            with told.task("parity", 1, "steps"):
                verification.parity = parity_of(model, reference, few)
        compared = origin.float_model(trust) if info is not None else origin.detecting
        _compare(verification, model, compared, origin, reference, images, data is not None, told)
        range_fits = fits(opened, (image[None] for image in few[:_RANGE_IMAGES]))
        file_candidates = None
        if opened.says is None or "scores" in opened.says.outputs:
            file_candidates = candidates(
                model.run(few), len(origin.detecting.names), model.image_size
            )
        best = _best(compared or origin.detecting, few)
    verification.blamed = worst(range_fits)
    verification.faults += faults.of_parity(verification.parity)
    verification.faults += faults.of_integers(info, counted)
    verification.faults += (
        faults.of_scores(file_candidates, best) if file_candidates is not None else []
    )
    verification.faults += faults.of_ranges(range_fits, verification.moved)
    if verification.parity is None and not verification.faults:
        # What has no other name.
        verification.faults += faults.of_detections(verification.moved)
    exact = verification.parity is not None and verification.parity.is_exact
    if verification.accuracy is not None and reference is not None and not exact:
        accuracy = verification.accuracy
        verification.faults += faults.of_accuracy(
            accuracy.AP, accuracy.reference_AP, max_drop, accuracy.difference
        )
    if origin.folder is not None:
        folder = origin.folder / "exports"
        try:
            folder.mkdir(exist_ok=True)
            write_json(folder / f"{opened.path.name}.verify.json", verification.to_dict())
        except OSError as error:
            verification.notes.append(
                f"not written beside the run: {shown(folder)}: {reason(error)}"
            )
    return verification


@dataclass(frozen=True)
class _Origin:
    """What a file is compared with.

    Attributes:
        detecting: the run's or the float model.
        folder, manifest: of the run; None for a float model.
        checkpoint: sha256 of the float model's file; None where it is no detector of dfq's.
    """

    detecting: Detecting
    folder: Path | None = None
    manifest: dict[str, Any] | None = None
    checkpoint: str | None = None

    def is_source_of(self, info: ExportInfo) -> bool:
        """Whether the file was exported from this very model."""
        model = None if self.manifest is None else self.manifest["model_sha256"]
        return self.checkpoint == info.checkpoint and info.model_sha256 == model

    def float_model(self, trust: bool) -> Detecting | None:
        """The float model, where it is at hand."""
        if self.manifest is None:
            return self.detecting
        for folder in sets_of(self.checkpoint or ""):
            with contextlib.suppress(UserError):
                return require_detector(origin_of(folder).load(trust=trust, device="cpu"))
        return None


def _open(path: Path, threads: int | None, trust: bool) -> RuntimeFile:
    opened = open_file(path, threads=threads, trust=trust)
    _refuse_nms(opened)
    if opened.says is not None and opened.says.runtime == "openvino" and path.suffix == ".onnx":
        says = opened.says
        opened = OpenVinoFile(path, threads)
        opened.says = says
    return opened


def _refuse_nms(file: RuntimeFile) -> None:
    """What is compared are the predictions before it, one by one."""
    if file.says is not None and file.says.nms is not None:
        raise UserError(
            f"{shown(file.path)}: has NMS within it, and predictions are compared before NMS; "
            "export it without --nms and verify that: all else is the same in both"
        )


def _origin(against: str | Path | Detector, trust: bool) -> _Origin:
    if isinstance(against, Detector):
        return _Origin(against, checkpoint=against.fingerprint)
    path = user_path(against)
    if is_exported(against) and path.is_file():
        file = open_file(path, trust=trust)
        _refuse_nms(file)
        if count(file).share_of_macs > 0:
            raise UserError(
                f"{argument('against', against)}: is quantized; give the float model or the run"
            )
        if file.says is None:
            return _Origin(ForeignModel(file, None, None))
        return _Origin(open_exported(path, trust=trust))
    if is_run(path):
        manifest = check_run(path)
        return _Origin(
            require_detector(load_run(path)),
            path,
            manifest,
            str(manifest["identity"]["checkpoint"]),
        )
    detector = require_detector(load_float(against, trust=trust, device="cpu"))
    return _Origin(detector, checkpoint=detector.fingerprint)


def _require_same(path: Path, info: ExportInfo, origin: _Origin) -> None:
    """Refuse a file of dfq's and a model that do not belong together."""
    end = "give the run or the float model that it was exported from"
    against = argument("against", origin.detecting.source)
    if origin.checkpoint is not None and origin.checkpoint != info.checkpoint:
        raise UserError(
            f"{against}: {shown(path.name)} was made from another network (sha256 "
            f"{shown(info.checkpoint, 15)}, and this one's is {origin.checkpoint[:12]}...); {end}"
        )
    if origin.manifest is not None and info.model_sha256 != origin.manifest["model_sha256"]:
        raise UserError(
            f"{against}: {shown(path.name)} was exported from another run of this network, or from "
            f"the float network; {end}"
        )
    if list(origin.detecting.names) != info.names:
        raise UserError(f"{against}: {shown(path.name)} has other categories; {end}")


def _as_model(opened: RuntimeFile, info: ExportInfo | None, origin: _Origin) -> ExportedModel:
    if opened.says is not None:
        # Of a `.pt2` file, what was opened says that it is trusted.
        parts = open_parts(opened.path, opened.says, None, trust=True)
        return Opened(opened, opened.says, parts)
    return ForeignModel(opened, list(origin.detecting.names), origin.detecting.image_size)


def _size(path: Path) -> int:
    beside = path.with_suffix(".bin")
    weights = beside.stat().st_size if path.suffix == ".xml" and beside.is_file() else 0
    return path.stat().st_size + weights


@contextlib.contextmanager
def _images(data: str | Path | None, origin: _Origin, size: int) -> Iterator[tuple[ImageSet, str]]:
    """Images to compare on, and what they are."""
    if data is not None:
        yield open_set(data), shown(data)
        return
    sets = sets_of(origin.checkpoint) if origin.checkpoint else []
    if sets:
        yield open_set(sets[0]).head(DIAGNOSIS_IMAGES), f"synthetic images of {shown(sets[0])}"
        return
    from ..demo.scenes import write_coco

    with tempfile.TemporaryDirectory() as folder:
        write_coco(Path(folder), MADE_UP, size)
        said = "drawn shapes, as no set of this network is in the cache: give --data for more"
        yield open_set(folder), said


def _letterboxed(images: ImageSet, model: ExportedModel) -> np.ndarray:
    pixels, _, _ = load_letterboxed(images, range(len(images)), model.image_size, model.stride)
    return pixels.numpy()


def _reference(
    info: ExportInfo, origin: _Origin, data: str | Path | None, notes: list[str]
) -> Detector | None:
    """The detector that the file was lowered from; None where it cannot be made again."""
    detector = origin.detecting
    assert isinstance(detector, Detector)
    if origin.manifest is None:
        return fold(detector.clone())
    policy = Policy.from_dict(origin.manifest["policy"])
    if info.runtime == "torch" or is_placed_for(policy, info.runtime):
        return detector
    sources = [*([data] if data is not None else []), *sets_of(origin.checkpoint or "")]
    for source in sources:
        with contextlib.suppress(UserError):
            pixels = range_images(detector, source)
            if info.ranges in (None, digest_of(pixels)):
                batches = (batch.float() / 255 for batch in pixels.split(8))
                return place_for(detector, policy, info.runtime, batches)[0]
    notes.append(
        "parity: not measured, as the images that ranges were found on are not in the cache; "
        "name them as --data"
    )
    return None


def _compare(
    verification: Verification,
    model: ExportedModel,
    compared: Detecting | None,
    origin: _Origin,
    reference: Detector | None,
    images: ImageSet,
    named: bool,
    told: Progress,
) -> None:
    """Detections of the file, the float model and the reference, and what they tell."""
    size = model.image_size

    def detections(detecting: Detecting, name: str) -> list[Detections]:
        detecting.check_size(size)
        with told.task(f"detection ({name})", len(images), "images") as task:
            return predict(detecting, images, image_size=size, progress=task.update)

    names = list(origin.detecting.names)
    ours = detections(model, "file")
    compared_name = "run in PyTorch" if compared is None else "float model"
    theirs = detections(compared or origin.detecting, compared_name)
    verification.moved = moved(theirs, ours, names, compared_name)
    verification.threshold = same_number(theirs, ours)
    if not named:
        return
    if not images.labelled:
        agreement = kept_of(theirs, ours).to_dict()
        labelled = pseudo_labelled(images, theirs, len(names))
        agreement["AP"] = _ap(labelled, ours, labelled.names) if agreement["objects"] else None
        verification.accuracy = Accuracy(verification.images, len(images), agreement=agreement)
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
    if compared is not None:
        of_float = _ap(images, theirs, names)
    if reference is not None:
        again = theirs if origin.manifest is None else detections(reference, "PyTorch")
        of_reference = _ap(images, again, names)
        if len(images) > 1:
            between = bootstrap_difference(images, ours, again, names)
    verification.accuracy = Accuracy(
        verification.images, len(images), _ap(images, ours, names), of_reference, of_float, between
    )


def _ap(images: ImageSet, detections: list[Detections], names: list[str]) -> float | None:
    """COCO AP; None where there is nothing to find."""
    value = score(images, detections, names).AP
    return None if math.isnan(value) else value


def _best(detecting: Detecting, images: np.ndarray) -> float:
    """The highest score of a model in images."""
    rows = [detecting.detect(torch.from_numpy(image[None]))[0].scores for image in images]
    return max((float(row.max()) for row in rows if len(row)), default=0.0)

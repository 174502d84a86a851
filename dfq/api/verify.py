"""`dfq verify`: an exported file against the run or the float model that it comes from."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError, argument, shown
from ..evaluation.measuring import check_alike
from ..export import faults
from ..export.class_files import task_of
from ..export.counting import count
from ..export.exported import ExportInfo
from ..export.opened import as_model, open_exported
from ..export.opening import OpenVinoFile, RuntimeFile, is_exported, open_file
from ..export.ranges import fits
from ..export.reference import parity_of
from ..export.replacing import is_placed_for, place_for
from ..export.verify import Verification, worst
from ..graph.fold_batchnorm import fold
from ..models.base import Model
from ..models.detecting import Task
from ..quantization.policy import Policy
from ..runs.folder import check_run, is_run, load_run
from ..runs.loading import load_float
from ..runtime.files import reason, user_path, write_json
from ..runtime.surroundings import Report, reporter
from .export import digest_of, range_images
from .verifying import Compared, Comparing, Origin
from .verifying_classifiers import ComparingClassifiers
from .verifying_detectors import ComparingDetectors

PARITY_IMAGES = 8
_RANGE_IMAGES = 8
MAX_DROP = 0.003
"""Of AP or top-1 accuracy, below the run in PyTorch, that a file may lose."""

COMPARING: Mapping[Task, Comparing] = {
    "detection": ComparingDetectors(),
    "classification": ComparingClassifiers(),
}


def verify(
    file: str | Path,
    against: str | Path | Model,
    *,
    data: str | Path | None = None,
    max_drop: float = MAX_DROP,
    threads: int | None = None,
    trust: bool = False,
    progress: Report = None,
) -> Verification:
    """Whether a file computes what it should, in integers, and where not, why.

    Args:
        file: an export of dfq's, or anyone's file of a detector or classifier: `.onnx`, `.xml`,
            `.tflite`, `.pt2`.
        against: the run's folder that it was exported from; or a float model: what names one, or a
            float file. What is found is also written into a run's folder, as
            `exports/<file name>.verify.json`.
        data: images to compare on, with labels or without; None: the network's set in the cache,
            else some that are made up.
        max_drop: AP or top-1 accuracy that the file may be below its run in PyTorch.
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
    comparing = COMPARING[origin.model.task]
    info = opened.says
    notes: list[str] = []
    counted = count(opened)
    if info is not None and info.weight_bits == 32 and counted.share_of_macs > 0:
        notes.append("quantized by another tool after dfq wrote it in float")
        info = None
    if info is not None:
        _require_same(opened.path, info, origin)
    # Of a `.pt2` file, what was opened says that it is trusted.
    model = (
        as_model(opened, opened.says, trust=True)
        if opened.says is not None
        else comparing.foreign(opened, origin.model)
    )
    if model.task != origin.model.task:
        check_alike(model, origin.model)
    words = ["dfq", "verify", str(file), "--against", str(origin.model.source)]
    words += ["--data", str(data)] if data is not None else []
    words += ["--max-drop", str(max_drop)] if max_drop != MAX_DROP else []
    words += ["--threads", str(threads)] if threads is not None else []
    verification = Verification(
        file=shown(opened.path.name),
        format=model.info.format,
        runtime=opened.runtime,
        size_bytes=_size(opened.path),
        precision=info.precision if info else "INT8" if counted.share_of_macs else "float",
        against=shown(origin.model.source),
        images="",
        integers=counted,
        command=shlex.join(words),
        notes=notes,
    )
    with contextlib.ExitStack() as stack:
        images, verification.images = stack.enter_context(comparing.images(data, origin, model))
        few = comparing.few(images, PARITY_IMAGES, model)
        reference = None
        if info is not None and origin.is_source_of(info):
            reference = _reference(info, origin, data, notes)
        if reference is not None:
            with told.task("parity", 1, "steps"):
                verification.parity = parity_of(model, reference, few)
        compared = Compared(
            origin, origin.float_model(trust) if info is not None else origin.model, reference
        )
        comparing.compare(verification, model, compared, images, data is not None, told)
        range_fits = fits(opened, (image[None] for image in model.as_input(few[:_RANGE_IMAGES])))
        faults_of_task = comparing.faults(verification, model, compared, few)
    verification.blamed = worst(range_fits)
    verification.faults += faults.of_parity(verification.parity)
    verification.faults += faults.of_integers(info, counted)
    verification.faults += faults_of_task
    verification.faults += faults.of_ranges(range_fits, verification.moved)
    if verification.parity is None and not verification.faults and verification.moved is not None:
        # What has no other name.
        lost = verification.moved.lost()
        verification.faults += [lost] if lost is not None else []
    exact = verification.parity is not None and verification.parity.is_exact
    if verification.accuracy is not None and reference is not None and not exact:
        verification.faults += faults.of_accuracy(verification.accuracy, max_drop)
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


def _origin(against: str | Path | Model, trust: bool) -> Origin:
    if isinstance(against, Model):
        return Origin(against, checkpoint=against.fingerprint)
    path = user_path(against)
    if is_exported(against) and path.is_file():
        file = open_file(path, trust=trust)
        _refuse_nms(file)
        if count(file).share_of_macs > 0:
            raise UserError(
                f"{argument('against', against)}: is quantized; give the float model or the run"
            )
        if file.says is None:
            return Origin(COMPARING[task_of(file)].foreign(file, None))
        return Origin(open_exported(path, trust=trust))
    if is_run(path):
        manifest = check_run(path)
        return Origin(load_run(path), path, manifest, str(manifest["identity"]["checkpoint"]))
    model = load_float(against, trust=trust, device="cpu")
    return Origin(model, checkpoint=model.fingerprint)


def _require_same(path: Path, info: ExportInfo, origin: Origin) -> None:
    """Refuse a file of dfq's and a model that do not belong together."""
    end = "give the run or the float model that it was exported from"
    against = argument("against", origin.model.source)
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
    if list(origin.model.names) != info.names:
        raise UserError(f"{against}: {shown(path.name)} has other categories; {end}")


def _size(path: Path) -> int:
    beside = path.with_suffix(".bin")
    weights = beside.stat().st_size if path.suffix == ".xml" and beside.is_file() else 0
    return path.stat().st_size + weights


def _reference(
    info: ExportInfo, origin: Origin, data: str | Path | None, notes: list[str]
) -> Model | None:
    """The model that the file was lowered from; None where it cannot be made again."""
    model = origin.model
    assert isinstance(model, Model)
    if origin.manifest is None:
        return fold(model.clone())
    policy = Policy.from_dict(origin.manifest["policy"])
    if info.runtime == "torch" or is_placed_for(policy, info.runtime):
        return model
    sources = [*([data] if data is not None else []), *origin.sets]
    for source in sources:
        with contextlib.suppress(UserError):
            pixels = range_images(model, source)
            if info.ranges in (None, digest_of(pixels)):
                batches = (batch.float() / 255 for batch in pixels.split(8))
                return place_for(model, policy, info.runtime, batches)[0]
    notes.append(
        "parity: not measured, as the images that ranges were found on are not where they were; "
        "name them as --data"
    )
    return None

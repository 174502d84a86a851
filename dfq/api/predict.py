"""`dfq predict`: what a detector finds in images, as pictures and as numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data.letterbox import LetterboxTransform, letterbox
from ..data.photos import list_photos, read_photo
from ..errors import UserError, argument, shown
from ..evaluation.agreement import check_categories
from ..evaluation.detection import detect_batch, eval_mode
from ..evaluation.prediction import Prediction, Predictions, prediction
from ..evaluation.prediction_picture import (
    LIST,
    draw_pair,
    draw_prediction,
    encode_picture,
    name_pictures,
    require_pictures,
)
from ..models import require_detector
from ..models.base import Detecting, Detector
from ..runs.loading import as_detecting, as_float
from ..runtime.ahead import batches_of, reading_ahead
from ..runtime.files import (
    json_bytes,
    require_output_file,
    require_output_folder,
    user_path,
    write_atomic,
)
from ..runtime.progress import Progress
from ..runtime.surroundings import Report, pick_device, reporter

_BATCH = 16
"""Images at a time, as in evaluation."""


def predict(
    model: str | Path | Detecting,
    images: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    compare: str | Path | Detector | None = None,
    threshold: float = 0.25,
    image_size: int | None = None,
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
) -> Predictions:
    """What a detector finds in images, with boxes in their own pixels.

    `to_supervision` of each gives what the trackers, zones and annotators of supervision take.

    Args:
        model: a detector, or what names one, a run folder, or an exported file.
        images: files, or folders that are searched with their subfolders. They are letterboxed as
            evaluation does it; EXIF orientation is applied. One that cannot be read is left out,
            and stands in `unreadable` of what is returned.
        out: folder for pictures with what was found, and `detections.json`; None: none are made.
        compare: the float detector to compare with, or what names it. Pictures have its detections
            on the left then, and each prediction has them as `reference`.
        threshold: detections with a lower score are left out, in [0, 1].
        image_size: side in pixels; None: the detector's own, which is the only one of most exported
            files.
        device, trust, progress: as for `synthesize`.

    Returns:
        A list of one `Prediction` for each image that could be read, with a few words on the whole.

    Raises:
        UserError: for anything the user can mend: no image can be read, or something that this did
            not write is in the way in `out`.

    Example:
        >>> predictions = dfq.predict("run", "set/images", threshold=0.9)
        >>> len(predictions)
        8
    """
    if not (isinstance(threshold, int | float) and 0 <= threshold <= 1):
        raise UserError(f"{argument('threshold', threshold)}: is no score; give one from 0 to 1")
    sources = [images] if isinstance(images, str | Path) else list(images)
    if not sources:
        raise UserError("which images? name files, or folders of them")
    folder = None if out is None else user_path(out, "--out")
    if folder is not None:
        require_output_folder(folder, "out")
    files = list_photos(sources, without=folder)
    names = name_pictures(files)
    if folder is not None:
        require_pictures(folder, names, files)
    target = pick_device(device)
    detector = as_detecting(model, trust=trust, device=target)
    detectors: list[Detecting] = [detector]
    if compare is not None:
        reference = require_detector(as_float(compare, trust=trust, device=target))
        check_categories(detector, reference, "compare")
        detectors.append(reference)
    size = detector.image_size if image_size is None else image_size
    for network in detectors:
        network.check_size(size)
    predictions = Predictions(
        model=shown(detector.source),
        image_size=size,
        threshold=float(threshold),
        compared=None if compare is None else shown(detectors[1].source),
    )
    report = reporter(progress)
    _detect(predictions, files, detectors, report, None if folder is None else (folder, names))
    if not predictions:
        problem = next(iter(predictions.unreadable.values()))
        rest = f"; of {len(files)} images none can be read" if len(files) > 1 else ""
        raise UserError(f"{problem}{rest}")
    if folder is not None:
        _write(folder / LIST, json_bytes(predictions.to_dict()))
    return predictions


def _detect(
    predictions: Predictions,
    files: Sequence[Path],
    detectors: Sequence[Detecting],
    report: Progress,
    pictures: tuple[Path, Sequence[str]] | None,
) -> None:
    """Fill `predictions`, and write a picture of each image where a folder and their names are
    given."""
    name_of = dict(zip(files, pictures[1], strict=True)) if pictures is not None else {}
    with contextlib.ExitStack() as stack:
        for detector in detectors:
            stack.enter_context(eval_mode(detector))
        task = stack.enter_context(report.task("detection", len(files), "images"))
        done = 0
        reading = _batches(files, predictions.image_size, detectors[0].stride)
        for batch in stack.enter_context(reading):
            for file, read in batch:
                if isinstance(read, UserError):
                    predictions.unreadable[str(file)] = str(read)
            ready = [(file, read) for file, read in batch if not isinstance(read, UserError)]
            for predicted in _predictions(ready, detectors, predictions.threshold):
                predictions.append(predicted)
                if pictures is not None:
                    name = name_of[Path(predicted.file)]
                    _write(pictures[0] / name, encode_picture(_picture(predicted, predictions)))
                    predictions.pictures[predicted.file] = name
            done += len(batch)
            # Where nothing can be read, one line says so.
            if predictions:
                task.update(done, len(files))
    if predictions:
        for problem in predictions.unreadable.values():
            report.note(f"left out: {problem}")


Read = tuple[Tensor, LetterboxTransform]
"""A canvas, uint8 `(s, s, 3)`, and how the image lies on it."""


def _batches(
    files: Sequence[Path], size: int, stride: int
) -> contextlib.AbstractContextManager[Iterator[list[tuple[Path, Read | UserError]]]]:
    """Letterboxed images, or what is wrong with them; the next ones are read while the network
    works on these. No more than one image is held at its own size, which may be large: so it is
    one thread that reads."""

    def read(file: Path) -> Read | UserError:
        try:
            canvas, transform = letterbox(read_photo(file), size, stride, rect=False)
        except UserError as error:
            return error
        return torch.from_numpy(canvas), transform

    return reading_ahead(
        batches_of(files, _BATCH),
        read,
        lambda group, read_images: list(zip(group, read_images, strict=True)),
        threads=1,
    )


def _predictions(
    ready: Sequence[tuple[Path, Read]], detectors: Sequence[Detecting], threshold: float
) -> list[Prediction]:
    """What the first of the detectors finds in a batch, and the second one for reference."""
    if not ready:
        return []
    images = torch.stack([canvas for _, (canvas, _) in ready]).permute(0, 3, 1, 2).contiguous()
    transforms = [transform for _, (_, transform) in ready]
    by_detector = [
        [
            prediction(
                str(file),
                transform.original,
                detections,
                detector.names,
                segments if detector.has_masks else None,
            )
            for (file, (_, transform)), (detections, segments) in zip(
                ready,
                detect_batch(
                    detector,
                    images.float() / 255,
                    transforms,
                    score_threshold=threshold,
                    masks=detector.has_masks,
                ),
                strict=True,
            )
        ]
        for detector in detectors
    ]
    if len(by_detector) == 1:
        return by_detector[0]
    return [
        replace(predicted, reference=reference)
        for predicted, reference in zip(*by_detector, strict=True)
    ]


def _picture(predicted: Prediction, predictions: Predictions) -> Image.Image:
    # Read again: a batch of large images would not fit into memory.
    pixels = read_photo(Path(predicted.file))
    if predicted.reference is None:
        return draw_prediction(pixels, predicted)
    return draw_pair(
        draw_prediction(pixels, predicted.reference, f"float: {predictions.compared}"),
        draw_prediction(pixels, predicted, f"this: {predictions.model}"),
    )


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Looked at again: the work took its time.
    require_output_file(path, "out")
    write_atomic(path, data)

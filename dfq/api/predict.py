"""`dfq predict`: what a model says of images, as pictures and as numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.photos import list_photos
from ..errors import UserError, shown
from ..evaluation.detection import eval_mode
from ..evaluation.measuring import check_alike
from ..evaluation.prediction_list import PredictionList
from ..evaluation.prediction_picture import (
    draw_pair,
    encode_picture,
    name_pictures,
    require_pictures,
)
from ..models.base import Model, Predicting
from ..runs.loading import as_float, as_measurable
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
from .predicting import ASKING, Asking, Read

_BATCH = 16
"""Images at a time, as in evaluation."""


def predict(
    model: str | Path | Predicting,
    images: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    compare: str | Path | Model | None = None,
    threshold: float | None = None,
    image_size: int | None = None,
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
) -> Any:
    """What a detector finds in images, with boxes in their own pixels, or what categories a
    classifier says that they are of.

    `to_supervision` of each prediction of a detector gives what the trackers, zones and annotators
    of supervision take.

    Args:
        model: a model, or what names one, a run folder, or an exported file.
        images: files, or folders that are searched with their subfolders. They are letterboxed, or
            resized and cut, as evaluation does it; EXIF orientation is applied. One that cannot be
            read is left out, and stands in `unreadable` of what is returned.
        out: folder for pictures with what was found, and `detections.json` or, of a classifier,
            `classes.json`; None: none are made.
        compare: the float model to compare with, or what names it. Pictures have what it says on
            the left then, and each prediction has it as `reference`.
        threshold: of detectors: detections with a lower score are left out, in [0, 1]; None: 0.25.
        image_size: side in pixels; None: the model's own, which is the only one of most exported
            files.
        device, trust, progress: as for `synthesize`.

    Returns:
        A list of one `Prediction`, or `ClassPrediction`, for each image that could be read, with a
        few words on the whole: `Predictions` or `ClassPredictions`.

    Raises:
        UserError: for anything the user can mend: no image can be read, or something that this did
            not write is in the way in `out`.

    Example:
        >>> predictions = dfq.predict("run", "set/images", threshold=0.9)
        >>> len(predictions)
        8
    """
    sources = [images] if isinstance(images, str | Path) else list(images)
    if not sources:
        raise UserError("which images? name files, or folders of them")
    folder = None if out is None else user_path(out, "--out")
    if folder is not None:
        require_output_folder(folder, "out")
    files = list_photos(sources, without=folder)
    names = name_pictures(files)
    target = pick_device(device)
    models = [as_measurable(model, trust=trust, device=target)]
    asking = ASKING[models[0].task]
    asking.check(threshold)
    if folder is not None:
        require_pictures(folder, names, files, asking.listed, asking.kind)
    if compare is not None:
        reference = as_float(compare, trust=trust, device=target)
        check_alike(models[0], reference, "compare")
        models.append(reference)
    size = models[0].image_size if image_size is None else image_size
    for network in models:
        network.check_size(size)
    predictions = asking.begun(
        threshold,
        model=shown(models[0].source),
        image_size=size,
        compared=None if compare is None else shown(models[1].source),
    )
    report = reporter(progress)
    pictures = None if folder is None else (folder, names)
    _predict(predictions, asking, files, models, report, pictures)
    if not predictions:
        problem = next(iter(predictions.unreadable.values()))
        rest = f"; of {len(files)} images none can be read" if len(files) > 1 else ""
        raise UserError(f"{problem}{rest}")
    if folder is not None:
        _write(folder / asking.listed, json_bytes(predictions.to_dict()))
    return predictions


def _predict(
    predictions: PredictionList[Any],
    asking: Asking,
    files: Sequence[Path],
    models: Sequence[Predicting],
    report: Progress,
    pictures: tuple[Path, Sequence[str]] | None,
) -> None:
    """Fill `predictions`, and write a picture of each image where a folder and their names are
    given."""
    name_of = dict(zip(files, pictures[1], strict=True)) if pictures is not None else {}
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(eval_mode(model))
        task = stack.enter_context(report.task(asking.verb, len(files), "images"))
        done = 0
        reading = _batches(asking, files, models[0], predictions.image_size)
        for batch in stack.enter_context(reading):
            for file, read in batch:
                if isinstance(read, UserError):
                    predictions.unreadable[str(file)] = str(read)
            ready = [(file, read) for file, read in batch if not isinstance(read, UserError)]
            by_model = [asking.say(ready, model, predictions) for model in models if ready]
            # What the first one says, and the second one for reference.
            for said in zip(*by_model, strict=True):
                predicted = said[0] if len(said) == 1 else asking.compared(*said)
                predictions.append(predicted)
                if pictures is not None:
                    name = name_of[Path(predicted.file)]
                    picture = _picture(asking, predicted, predictions)
                    _write(pictures[0] / name, encode_picture(picture))
                    predictions.pictures[predicted.file] = name
            done += len(batch)
            # Where nothing can be read, one line says so.
            if predictions:
                task.update(done, len(files))
    if predictions:
        for problem in predictions.unreadable.values():
            report.note(f"left out: {problem}")


def _batches(
    asking: Asking, files: Sequence[Path], model: Predicting, size: int
) -> contextlib.AbstractContextManager[Iterator[list[tuple[Path, Read | UserError]]]]:
    """Images as the model takes them, or what is wrong with them; the next ones are read while the
    network works on these. No more than one image is held at its own size, which may be large: so
    it is one thread that reads."""

    def read(file: Path) -> Read | UserError:
        try:
            return asking.read(file, model, size)
        except UserError as error:
            return error

    return reading_ahead(
        batches_of(files, _BATCH),
        read,
        lambda group, read_images: list(zip(group, read_images, strict=True)),
        threads=1,
    )


def _picture(asking: Asking, predicted: Any, predictions: PredictionList[Any]) -> Image.Image:
    file = Path(predicted.file)
    if predicted.reference is None:
        return asking.draw(file, predicted, None)
    return draw_pair(
        asking.draw(file, predicted.reference, f"float: {predictions.compared}"),
        asking.draw(file, predicted, f"this: {predictions.model}"),
    )


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Looked at again: the work took its time.
    require_output_file(path, "out")
    write_atomic(path, data)

"""`dfq eval`: a detector measured against a set's labels, or against another network."""

from __future__ import annotations

from pathlib import Path
from typing import overload

from ..data.readers import open_set
from ..errors import UserError, shown
from ..evaluation.agreement import REFERENCE_SCORE, Agreement, agreement, check_categories
from ..evaluation.coco import Metrics
from ..evaluation.coco import evaluate as evaluate_detector
from ..models.base import Detecting, Detector
from ..quantization.dynamic import is_dynamic
from ..runs.loading import as_detecting, as_float
from ..runtime.surroundings import Report, pick_device, reporter


@overload
def evaluate(
    model: str | Path | Detecting,
    data: str | Path,
    *,
    against: None = None,
    image_size: int | None = None,
    interval: bool = False,
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
) -> Metrics: ...


@overload
def evaluate(
    model: str | Path | Detecting,
    data: str | Path,
    *,
    against: str | Path | Detector,
    image_size: int | None = None,
    interval: bool = False,
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
) -> Agreement: ...


def evaluate(
    model: str | Path | Detecting,
    data: str | Path,
    *,
    against: str | Path | Detector | None = None,
    image_size: int | None = None,
    interval: bool = False,
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
) -> Metrics | Agreement:
    """COCO AP of a float detector, a run or an exported file on a labelled set; fractions in
    [0, 1].

    Args:
        model: a detector, or what names one, a run folder, or an exported file.
        data: the set.
        against: a float detector, or what names one: its detections are taken for labels, those of
            the set do not count, and it needs none. None: measured against the set's labels.
        image_size: side in pixels; None: the detector's own, which is the only one of most exported
            files.
        interval: also find between which values AP is over the draw of images.
        device, trust, progress: as for `synthesize`.

    Returns:
        An `Agreement` where `against` is given.

    Raises:
        UserError: for anything the user can mend.

    Example:
        >>> dfq.evaluate("demo", "set", image_size=64).images
        8
    """
    images = open_set(data)
    target = pick_device(device)
    detector, told = as_detecting(model, trust=trust, device=target), reporter(progress)
    if isinstance(detector, Detector) and is_dynamic(detector.module):
        told.note("activations: dynamic ranges, each call's own least and greatest value")
    if against is not None:
        reference = as_float(against, trust=trust, device=target)
        check_categories(detector, reference)
        found = agreement(
            detector,
            reference,
            images,
            progress=told,
            image_size=image_size,
            interval=interval,
        )
        if not found.objects:
            raise UserError(
                f"{shown(data)}: {shown(reference.source)} detects nothing with a score above "
                f"{REFERENCE_SCORE} in these images; give images of what it was trained for"
            )
        return found
    with told.task("evaluation", len(images), "images") as task:
        return evaluate_detector(
            detector, images, image_size=image_size, interval=interval, progress=task.update
        )

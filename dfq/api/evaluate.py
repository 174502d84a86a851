"""`dfq eval`: a detector measured against a set's labels, or against another network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

from ..data.readers import open_set
from ..errors import UserError, argument, shown
from ..evaluation.agreement import REFERENCE_SCORE, Agreement, agreement, check_categories
from ..evaluation.classification import Agreed, ClassificationMetrics
from ..evaluation.coco import Metrics
from ..evaluation.coco import evaluate as evaluate_detector
from ..evaluation.measuring import close_on_images, measured, open_labelled, open_unlabelled
from ..models import require_detector
from ..models.base import Detecting, Detector, Model
from ..models.classifying import Classifier
from ..quantization.dynamic import is_dynamic
from ..runs.loading import Measurable, as_float, as_measurable
from ..runtime.progress import Progress
from ..runtime.surroundings import Report, pick_device, reporter


@overload
def evaluate(
    model: Detecting,
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
    model: Detecting,
    data: str | Path,
    *,
    against: str | Path | Model,
    image_size: int | None = None,
    interval: bool = False,
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
) -> Agreement: ...


@overload
def evaluate(
    model: Classifier,
    data: str | Path,
    *,
    against: str | Path | Model | None = None,
    image_size: int | None = None,
    interval: bool = False,
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
) -> ClassificationMetrics | Agreed: ...


@overload
def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    against: str | Path | Model | None = None,
    image_size: int | None = None,
    interval: bool = False,
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
) -> Any: ...


def evaluate(
    model: str | Path | Measurable,
    data: str | Path,
    *,
    against: str | Path | Model | None = None,
    image_size: int | None = None,
    interval: bool = False,
    device: str = "auto",
    trust: bool = False,
    progress: Report = None,
) -> Metrics | ClassificationMetrics | Agreement | Agreed:
    """COCO AP of a float detector, a run or an exported file on a labelled set, or how often a
    classifier is right; fractions in [0, 1].

    Args:
        model: a detector or a classifier, or what names one, a run folder, or an exported file.
        data: the set; of a classifier, a folder or a ZIP file with a folder for each category.
        against: a float detector, or what names one: its detections are taken for labels, those of
            the set do not count, and it needs none. None: measured against the set's labels.
        image_size: side in pixels; None: the detector's own, which is the only one of most exported
            files.
        interval: also find between which values AP is over the draw of images.
        device, trust, progress: as for `synthesize`.

    Returns:
        An `Agreement` where `against` is given; of classifiers, `ClassificationMetrics`, and
        `Agreed`.

    Raises:
        UserError: for anything the user can mend.

    Example:
        >>> dfq.evaluate("demo", "set", image_size=64).images
        8
    """
    target = pick_device(device)
    detector, told = as_measurable(model, trust=trust, device=target), reporter(progress)
    if isinstance(detector, Model) and is_dynamic(detector.module):
        told.note("activations: dynamic ranges, each call's own least and greatest value")
    if isinstance(detector, Classifier):
        return _of_classifier(detector, data, against, image_size, interval, target, trust, told)
    if isinstance(detector, Model) and not isinstance(detector, Detector):
        detector = require_detector(detector)
    images = open_set(data)
    if against is not None:
        reference = require_detector(as_float(against, trust=trust, device=target))
        check_categories(detector, reference)
        metrics = agreement(
            detector,
            reference,
            images,
            progress=told,
            image_size=image_size,
            interval=interval,
        )
        if not metrics.objects:
            raise UserError(
                f"{shown(data)}: {shown(reference.source)} detects nothing with a score above "
                f"{REFERENCE_SCORE} in these images; give images of what it was trained for"
            )
        return metrics
    with told.task("evaluation", len(images), "images") as task:
        return evaluate_detector(
            detector, images, image_size=image_size, interval=interval, progress=task.update
        )


def _of_classifier(
    model: Classifier,
    data: str | Path,
    against: str | Path | Model | None,
    image_size: int | None,
    interval: bool,
    device: str,
    trust: bool,
    progress: Progress,
) -> ClassificationMetrics | Agreed:
    """`evaluate` of a classifier."""
    if against is None:
        images = open_labelled(data, model)
        with progress.task("evaluation", len(images), "images") as task:
            metrics = measured(
                model, images, image_size=image_size, interval=interval, progress=task.update
            )
        assert isinstance(metrics, ClassificationMetrics)
        return metrics
    reference = as_float(against, trust=trust, device=device)
    if list(reference.names) != list(model.names):
        raise UserError(
            f"{argument('against', reference.source)}: its categories are not those of the model; "
            "give the float network that the model was made from"
        )
    photos = open_unlabelled(data, model)
    agreed = close_on_images(model, reference, photos, progress=progress, image_size=image_size)
    assert isinstance(agreed, Agreed)
    return agreed

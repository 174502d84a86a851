"""`dfq eval`: a model measured against a set's labels, or against another network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

from ..errors import UserError, shown
from ..evaluation.agreement import REFERENCE_SCORE, Agreement
from ..evaluation.classification import Agreed, ClassificationMetrics
from ..evaluation.coco import Metrics
from ..evaluation.measuring import (
    check_alike,
    close_on_images,
    measured,
    open_labelled,
    open_unlabelled,
)
from ..models.base import Detecting, Model
from ..models.classifying import Classifying
from ..quantization.dynamic import is_dynamic
from ..runs.loading import Measurable, as_float, as_measurable
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
    model: Classifying,
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
        against: a float model, or what names one: what it detects, or the category that it finds
            likeliest, is taken for labels, those of the set do not count, and it needs none. None:
            measured against the set's labels.
        image_size: side in pixels; None: the model's own, which is the only one of most exported
            files.
        interval: also find between which values AP, or top-1 accuracy, is over the draw of images.
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
    measurable, told = as_measurable(model, trust=trust, device=target), reporter(progress)
    if isinstance(measurable, Model) and is_dynamic(measurable.module):
        told.note("activations: dynamic ranges, each call's own least and greatest value")
    if against is None:
        labelled = open_labelled(data, measurable)
        with told.task("evaluation", len(labelled), "images") as task:
            return measured(
                measurable,
                labelled,
                image_size=image_size,
                interval=interval,
                progress=task.update,
            )
    reference = as_float(against, trust=trust, device=target)
    check_alike(measurable, reference)
    closeness = close_on_images(
        measurable,
        reference,
        open_unlabelled(data, measurable),
        progress=told,
        image_size=image_size,
        interval=interval,
    )
    if isinstance(closeness, Agreement) and not closeness.objects:
        raise UserError(
            f"{shown(data)}: {shown(reference.source)} detects nothing with a score above "
            f"{REFERENCE_SCORE} in these images; give images of what it was trained for"
        )
    return closeness

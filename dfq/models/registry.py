"""Families of models, and how each rebuilds one from its description."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..runtime.plain import ODD, brief, one_line, plain_tree
from .base import Model
from .metadata import source_of

if TYPE_CHECKING:
    from .ultralytics.detector import UltralyticsDetector
    from .yolov5.detector import YOLOv5


def _families() -> tuple[type[YOLOv5], type[UltralyticsDetector]]:
    # Here and not above: importing Ultralytics takes seconds.
    from .ultralytics.detector import UltralyticsDetector
    from .yolov5.detector import YOLOv5

    return (YOLOv5, UltralyticsDetector)


def from_spec(spec: dict[str, Any]) -> Model:
    """Rebuild the architecture that `Model.spec` described, with random weights.

    Raises:
        UserError: the description is damaged or of an unknown family.
    """
    plain = plain_tree(spec, "the description")
    family = plain.get("family") if isinstance(plain, dict) else None
    if not isinstance(family, str) or family not in _SPECS:
        raise UserError(
            f"the description is of the family {brief(family)}; known are {', '.join(_SPECS)}"
        )
    try:
        return _SPECS[family](plain)
    except UserError:
        raise
    except ODD as error:
        raise UserError(
            f"the description of {source_of(plain)} cannot be used ({one_line(error)}): it is "
            "damaged or of another version of dfq"
        ) from error


def _torchvision_spec(spec: dict[str, Any]) -> Model:
    from .torchvision.base import TorchvisionDetector

    return TorchvisionDetector.from_spec(spec)


def _mmdet_spec(spec: dict[str, Any]) -> Model:
    from .mmdet.config import require_mmdet

    require_mmdet()
    from .mmdet.base import MMDetDetector

    return MMDetDetector.from_spec(spec)


def _classifier_spec(spec: dict[str, Any]) -> Model:
    from .classifiers.classifier import NetworkClassifier

    return NetworkClassifier.from_spec(spec)


_SPECS: dict[Any, Callable[[dict[str, Any]], Model]] = {
    "yolov5": lambda spec: _families()[0].from_spec(spec),
    "ultralytics": lambda spec: _families()[1].from_spec(spec),
    "torchvision": _torchvision_spec,
    "mmdet": _mmdet_spec,
    "classifier": _classifier_spec,
}
"""What rebuilds a model of a family from its description."""

"""From what a user names to a model: files, published names, networks of other packages."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError, naming, shown
from ..runtime.files import user_path
from ..runtime.plain import ODD, brief, one_line
from ..runtime.suggest import suggestion
from ..runtime.unfinished import NAME_BYTES
from .base import Detector, Model
from .bounded import bounded, most_for
from .checkpoint import (
    Checkpoint,
    class_of,
    find_model,
    holds_no_module,
    read_checkpoint,
    sha256_of,
)
from .registry import _families
from .storage import is_of_dfq, read_detector
from .tensors import read_metadata, read_safetensors

if TYPE_CHECKING:
    from .classifiers.classifier import NetworkClassifier

Reading = TypeVar("Reading")

TORCHVISION = "torchvision/"
"""What the name of a network of torchvision starts with."""


TIMM = "timm/"
"""What the name of a network of timm starts with."""


RANDOM = "random"
"""What stands for the weights of a network that is meant to have random ones."""


_CHECKPOINTS = (".pt", ".pth", ".th")
_SUFFIXES = (*_CHECKPOINTS, ".yaml", ".yml", ".safetensors", ".py")


_ACCEPTED = (
    "a checkpoint (.pt, .pth), a model YAML (.yaml), a detector saved by dfq (.safetensors), "
    "a published network (e.g. yolo11n, yolov8s, yolov5n), torchvision/NAME, timm/NAME, "
    "a config of mmdet (.py, or the name of one that comes with it) or demo"
)


def load_detector(model: str | Path, *, trust: bool = False, device: str = "cpu") -> Detector:
    """Load a detector; arguments are those of `load_model`.

    Raises:
        UserError: nothing by that name, no detector in it, no network, or no such device.
    """
    return require_detector(load_model(model, trust=trust, device=device))


def require_detector(model: Model) -> Detector:
    """The model, which has to be a detector.

    Raises:
        UserError: it classifies images.
    """
    if not isinstance(model, Detector):
        raise UserError(f"{shown(model.source)}: classifies images; this is for detectors alone")
    return model


def load_model(model: str | Path, *, trust: bool = False, device: str = "cpu") -> Model:
    """Load a detector or a classifier: unfused, in eval mode, its parameters frozen, float32.

    Args:
        model: the path of a checkpoint, of a model YAML (random weights), of a file that
            `save_detector` wrote or of the `model.safetensors` of a run (then it is quantized and
            folded); the name of a model YAML of Ultralytics ("yolo11n.yaml"); the name of a
            published network ("yolo11s", "yolov5n.pt"), downloaded where need be;
            "torchvision/NAME" or a config of mmdet (a file, or the name of one that comes with
            it), with random weights; or "demo", the small detector that comes with dfq. Of
            classifiers a state dict of a kind that its tensors tell, a YAML that describes one, or
            "timm/NAME". Where a network and its weights are apart: "NETWORK@CHECKPOINT", or
            "NETWORK@random" for one that is meant to have random weights.
        trust: run what is in a checkpoint, for files whose author is trusted.
        device: where to put it, e.g. "cpu" or "cuda:0".

    Raises:
        UserError: nothing by that name, no model in it, no network, or no such device.
    """
    name = str(model)
    detector = _load(name, trust)
    detector.source = name
    try:
        return detector.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use the device {device}: {one_line(error)}") from error


def _load(name: str, trust: bool) -> Model:
    if any(len(os.fsencode(part)) > NAME_BYTES for part in name.split("/")):
        # Longer than any file's: the system would say so at every look.
        raise UserError(f"there is no detector {shown(name)}: give {_ACCEPTED}")
    path = user_path(name)
    if path.is_file():
        return _from_file(path, trust)
    network, apart, weights = name.rpartition("@")
    if apart:
        return _from_parts(network, user_path(weights), trust)
    if name.startswith((TORCHVISION, TIMM)) or _mmdet_config(name) is not None:
        return _from_network(name, None)
    if name == "demo":
        demo = Path(__file__).parents[1] / "demo" / "detector.safetensors"
        if not demo.is_file():
            raise UserError(f"this installation lacks the demo detector {demo}: install dfq again")
        return read_detector(demo)
    if path.is_dir():
        raise UserError(f"{name} is a folder: give the file of a detector in it")
    if _is_yaml(name):
        return _from_yaml(name)

    from .ultralytics.resolve import fetch, is_published

    if is_published(name):
        return _from_checkpoint(fetch(name), trust)
    raise UserError(f"there is no detector {shown(name)}: give {_ACCEPTED}{_meant(name, path)}")


def _meant(name: str, path: Path) -> str:
    """What a name that is none may have been meant to be."""
    from .classifiers.zoo import NETWORKS
    from .mmdet.config import shipped_names
    from .torchvision.networks import MODELS
    from .ultralytics.resolve import published

    beside: list[str] = []
    if path.parent.is_dir():
        # Only the names of files that could be one.
        files = itertools.islice(path.parent.iterdir(), 1000)
        beside = sorted(str(p) for p in files if p.suffix.lower() in _SUFFIXES)
    known = ["demo", *published(), *shipped_names()]
    known += [TORCHVISION + model for model in (*MODELS, *NETWORKS)]
    return suggestion(str(path) if "/" in name else name, [*beside, *known])


def _from_parts(network: str, weights: Path, trust: bool) -> Model:
    """A network named in one place and its weights in another."""
    if not weights.is_file():
        if str(weights) == RANDOM:
            detector = _from_yaml(network) if _is_yaml(network) else _from_network(network, None)
            detector.random_weights = False
            return detector
        raise UserError(f"there is no checkpoint {weights}: check the path")
    if weights.suffix.lower() == ".safetensors":
        checkpoint = Checkpoint(weights, sha256_of(weights), read_safetensors(weights))
        return _from_network(network, checkpoint)
    return _from_network(network, read_checkpoint(weights, trust=trust))


def _is_yaml(name: str) -> bool:
    return Path(name).suffix.lower() in (".yaml", ".yml")


def _from_network(network: str, checkpoint: Checkpoint | None) -> Model:
    detector: Model
    told = _classifier(network)
    if told is not None:
        from .classifiers import loading as classifiers

        if checkpoint is None:
            detector = classifiers.from_description(told, network)
        else:
            detector = _odd(checkpoint.path, lambda: classifiers.from_checkpoint(checkpoint, told))
        detector.random_weights = checkpoint is None
        return detector
    if network.startswith(TORCHVISION):
        from .torchvision.base import from_name

        _require_known(network.removeprefix(TORCHVISION))
        detector = from_name(network.removeprefix(TORCHVISION), checkpoint)
        detector.random_weights = checkpoint is None
        return detector
    config = _mmdet_config(network)
    if config is not None:
        from .mmdet.config import require_mmdet

        require_mmdet()
        from .mmdet.base import from_config

        detector = from_config(config, checkpoint)
        detector.random_weights = checkpoint is None
        return detector
    raise UserError(
        f"{network}: takes no separate checkpoint; that is for torchvision/NAME, timm/NAME, "
        "descriptions of classifiers and configs of mmdet. Give the checkpoint itself as --model"
    )


def _require_known(name: str) -> None:
    """Refuse a name that is of no network of torchvision, of neither kind."""
    from .classifiers.zoo import NETWORKS
    from .torchvision.networks import MODELS

    known = [*MODELS, *NETWORKS]
    if name not in known:
        raise UserError(
            f"{TORCHVISION}{brief(name)[1:-1]}: unknown; known are {', '.join(known)}"
            f"{suggestion(name, known)}"
        )


def _classifier(network: str) -> dict[str, Any] | None:
    """What is told of a classifier by its name, or by the file that describes it; None where it is
    none."""
    if network.startswith((TORCHVISION, TIMM)):
        from .classifiers.loading import NETWORK
        from .classifiers.zoo import is_named

        return {NETWORK: network} if is_named(network) else None
    path = user_path(network)
    if not _is_yaml(network) or not path.is_file():
        return None
    from .classifiers.loading import read_description

    return read_description(path)


def _mmdet_config(name: str) -> Path | None:
    """The config of mmdet that goes by that name, a file's or of one that comes with mmdet."""
    path = user_path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    from .mmdet.config import shipped_config

    return shipped_config(name)


def _from_file(path: Path, trust: bool) -> Model:
    suffix = path.suffix.lower()
    if suffix in _CHECKPOINTS:
        return _from_checkpoint(path, trust)
    if suffix in (".yaml", ".yml"):
        return _from_yaml(str(path))
    if suffix == ".safetensors":
        return _from_safetensors(path)
    if suffix == ".py":
        return _from_network(str(path), None)
    raise UserError(f"{path} is not a file that dfq reads: give {_ACCEPTED}")


def _from_safetensors(path: Path) -> Model:
    metadata = read_metadata(path)
    if not is_of_dfq(metadata):
        from .classifiers.loading import described_by

        told = described_by(metadata, str(path))
        classifier = _recognised(Checkpoint(path, sha256_of(path), read_safetensors(path)), told)
        if classifier is not None:
            return classifier
    return read_detector(path)


def _recognised(checkpoint: Checkpoint, told: dict[str, Any]) -> NetworkClassifier | None:
    """The classifier whose state dict a checkpoint is; None where it is another's."""
    from .classifiers import loading as classifiers

    return _odd(checkpoint.path, lambda: classifiers.recognised(checkpoint, told))


def _from_yaml(name: str) -> Model:
    if _classifier(name) is not None:
        return _from_network(name, None)
    from .ultralytics.detector import UltralyticsDetector

    return UltralyticsDetector.from_yaml(name)


def _from_checkpoint(path: Path, trust: bool) -> Model:
    checkpoint = read_checkpoint(path, trust=trust)

    def read() -> Model | str:
        with naming(path):
            if (
                holds_no_module(checkpoint)
                and (classifier := _recognised(checkpoint, {})) is not None
            ):
                return classifier
            for family in _families():
                if family.matches(checkpoint):
                    with bounded(str(path), most=most_for(path.stat().st_size)):
                        return family.from_checkpoint(checkpoint)
            return class_of(find_model(checkpoint))

    content = _odd(path, read)
    if isinstance(content, Model):
        return content
    raise UserError(
        f"{path} holds a {brief(content)[1:-1]}, not a detector of YOLOv5 or Ultralytics"
    )


def _odd(path: Path, read: Callable[[], Reading]) -> Reading:
    """What a function makes of a checkpoint."""
    try:
        return read()
    except ODD as error:
        # What of a checkpoint is looked at is checked where it is; this is for what was not
        # thought of.
        raise UserError(
            f"{path} holds something that no detector does ({one_line(error)}): it is damaged or "
            "of an unknown kind"
        ) from error

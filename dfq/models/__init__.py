"""Detectors of every family behind one protocol, and the one function that loads them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError, naming, shown
from ..runtime.files import NAME_BYTES, reason, user_path, write_atomic
from ..runtime.plain import ODD, brief, one_line, parse_json, plain_tree
from ..runtime.suggest import suggestion
from .base import Boundary, Detections, Detector, DistillationPair, Targets
from .bounded import bounded, most_for
from .checkpoint import Checkpoint, class_of, find_model, read_checkpoint, sha256_of
from .metadata import source_of
from .tensors import (
    check_kinds,
    read_metadata,
    read_safetensors,
    require_intact,
    sound,
    with_digest,
)

if TYPE_CHECKING:
    from .ultralytics.detector import UltralyticsDetector
    from .yolov5.detector import YOLOv5

TORCHVISION = "torchvision/"
"""What the name of a network of torchvision starts with."""
RANDOM = "random"
"""What stands for the weights of a network that is meant to have random ones."""
_SUFFIXES = (".pt", ".pth", ".yaml", ".yml", ".safetensors", ".py")

__all__ = [
    "Boundary",
    "Detections",
    "Detector",
    "DistillationPair",
    "Targets",
    "from_spec",
    "load_detector",
    "save_detector",
]

# Read by Ultralytics when it is first imported; it would otherwise log to standard output.
os.environ.setdefault("YOLO_VERBOSE", "False")
# Installing packages behind the user's back is not for a library to do.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")

_METADATA_KEY = "dfq"
_ACCEPTED = (
    "a checkpoint (.pt, .pth), a model YAML (.yaml), a detector saved by dfq (.safetensors), "
    "a published network (e.g. yolo11n, yolov8s, yolov5n), torchvision/NAME, "
    "a config of mmdet (.py, or the name of one that comes with it) or demo"
)


def _families() -> tuple[type[YOLOv5], type[UltralyticsDetector]]:
    # Here and not above: importing Ultralytics takes seconds.
    from .ultralytics.detector import UltralyticsDetector
    from .yolov5.detector import YOLOv5

    return (YOLOv5, UltralyticsDetector)


def load_detector(model: str | Path, *, trust: bool = False, device: str = "cpu") -> Detector:
    """Load a detector: unfused, in eval mode, its parameters frozen, float32.

    Args:
        model: the path of a checkpoint, of a model YAML (random weights), of a file that
            `save_detector` wrote or of the `model.safetensors` of a run (then it is quantized and
            folded); the name of a model YAML of Ultralytics ("yolo11n.yaml"); the name of a
            published network ("yolo11s", "yolov5n.pt"), downloaded where need be;
            "torchvision/NAME" or a config of mmdet (a file, or the name of one that comes with
            it), with random weights; or "demo", the small detector that comes with dfq. Where a
            network and its weights are apart: "NETWORK@CHECKPOINT", or "NETWORK@random" for one
            that is meant to have random weights.
        trust: run what is in a checkpoint, for files whose author is trusted.
        device: where to put it, e.g. "cpu" or "cuda:0".

    Raises:
        UserError: nothing by that name, no detector in it, no network, or no such device.
    """
    name = str(model)
    detector = _load(name, trust)
    detector.source = name
    try:
        return detector.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use the device {device}: {one_line(error)}") from error


def from_spec(spec: dict[str, Any]) -> Detector:
    """Rebuild the architecture that `Detector.spec` described, with random weights.

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


def _torchvision_spec(spec: dict[str, Any]) -> Detector:
    from .torchvision.base import TorchvisionDetector

    return TorchvisionDetector.from_spec(spec)


def _mmdet_spec(spec: dict[str, Any]) -> Detector:
    from .mmdet.config import require_mmdet

    require_mmdet()
    from .mmdet.base import MMDetDetector

    return MMDetDetector.from_spec(spec)


_SPECS: dict[Any, Callable[[dict[str, Any]], Detector]] = {
    "yolov5": lambda spec: _families()[0].from_spec(spec),
    "ultralytics": lambda spec: _families()[1].from_spec(spec),
    "torchvision": _torchvision_spec,
    "mmdet": _mmdet_spec,
}
"""What rebuilds a detector of a family from its description."""


def save_detector(
    detector: Detector, path: str | Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a detector as one `.safetensors` file, which `load_detector` reads back.

    The file appears whole or not at all.

    Args:
        detector: a detector with plain (not quantized) layers.
        path: the file; its folder must exist.
        dtype: of the floating tensors, float32 or float16. Tensors that float16 cannot hold
            (BatchNorm variances above 65504) stay float32.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype must be float32 or float16, got {dtype}")
    tensors = {
        name: _stored(tensor, dtype) for name, tensor in detector.module.state_dict().items()
    }
    # One entry: the file format keeps several in no order of its own.
    text = json.dumps(with_digest(detector.spec(), tensors))
    try:
        write_atomic(path, save(tensors, metadata={_METADATA_KEY: text}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        cast = tensor.to(dtype)
        tensor = cast if torch.isfinite(cast).all() else tensor.float()
    # A copy: safetensors refuses tensors that share memory.
    return tensor.clone(memory_format=torch.contiguous_format)


def _load(name: str, trust: bool) -> Detector:
    if any(len(os.fsencode(part)) > NAME_BYTES for part in name.split("/")):
        # Longer than any file's: the system would say so at every look.
        raise UserError(f"there is no detector {shown(name)}: give {_ACCEPTED}")
    path = user_path(name)
    if path.is_file():
        return _from_file(path, trust)
    network, apart, weights = name.rpartition("@")
    if apart:
        return _from_parts(network, user_path(weights), trust)
    if name.startswith(TORCHVISION) or _mmdet_config(name) is not None:
        return _from_network(name, None)
    if name == "demo":
        demo = Path(__file__).parents[1] / "demo" / "detector.safetensors"
        if not demo.is_file():
            raise UserError(f"this installation lacks the demo detector {demo}: install dfq again")
        return _from_safetensors(demo)
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
    from .mmdet.config import shipped_names
    from .torchvision.networks import MODELS
    from .ultralytics.resolve import published

    beside: list[str] = []
    if path.parent.is_dir():
        # Only the names of files that could be one.
        found = itertools.islice(path.parent.iterdir(), 1000)
        beside = sorted(str(p) for p in found if p.suffix.lower() in _SUFFIXES)
    known = ["demo", *published(), *(TORCHVISION + model for model in MODELS), *shipped_names()]
    return suggestion(str(path) if "/" in name else name, [*beside, *known])


def _from_parts(network: str, weights: Path, trust: bool) -> Detector:
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


def _from_network(network: str, checkpoint: Checkpoint | None) -> Detector:
    detector: Detector
    if network.startswith(TORCHVISION):
        from .torchvision.base import from_name

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
        f"{network}: takes no separate checkpoint; that is for torchvision/NAME and configs of "
        "mmdet. Give the checkpoint itself as --model"
    )


def _mmdet_config(name: str) -> Path | None:
    """The config of mmdet that goes by that name, a file's or of one that comes with mmdet."""
    path = user_path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    from .mmdet.config import shipped_config

    return shipped_config(name)


def _from_file(path: Path, trust: bool) -> Detector:
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth"):
        return _from_checkpoint(path, trust)
    if suffix in (".yaml", ".yml"):
        return _from_yaml(str(path))
    if suffix == ".safetensors":
        return _from_safetensors(path)
    if suffix == ".py":
        return _from_network(str(path), None)
    raise UserError(f"{path} is not a file that dfq reads: give {_ACCEPTED}")


def _from_yaml(name: str) -> Detector:
    from .ultralytics.detector import UltralyticsDetector

    return UltralyticsDetector.from_yaml(name)


def _from_checkpoint(path: Path, trust: bool) -> Detector:
    checkpoint = read_checkpoint(path, trust=trust)
    try:
        with naming(path):
            for family in _families():
                if family.matches(checkpoint):
                    with bounded(str(path), most=most_for(path.stat().st_size)):
                        return family.from_checkpoint(checkpoint)
            what = class_of(find_model(checkpoint))
    except ODD as error:
        # What of a checkpoint is looked at is checked where it is; this is for what was not
        # thought of.
        raise UserError(
            f"{path} holds something that no detector does ({one_line(error)}): it is damaged or "
            "of an unknown kind"
        ) from error
    raise UserError(f"{path} holds a {brief(what)[1:-1]}, not a detector of YOLOv5 or Ultralytics")


def _from_safetensors(path: Path) -> Detector:
    # Not above: runs are made of detectors.
    from ..runs.folder import is_quantized, load_quantized

    metadata = read_metadata(path)
    if is_quantized(metadata):
        return load_quantized(path)
    if _METADATA_KEY not in metadata:
        raise UserError(
            f"{path} was not written by dfq (it holds tensors only): give the checkpoint (.pt)"
        )
    try:
        spec = parse_json(metadata[_METADATA_KEY], "its description")
        with bounded("its description", most=most_for(path.stat().st_size)):
            detector = from_spec(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    tensors = read_safetensors(path)
    _fill(detector, sound(tensors, str(path)), path)
    require_intact(tensors, spec, str(path))
    detector.fingerprint = sha256_of(path)
    return detector


def _fill(detector: Detector, state: dict[str, Tensor], path: Path) -> None:
    check_kinds(detector.module.state_dict(), state, str(path))
    try:
        missing, unknown = detector.module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit the network it describes: {one_line(error)}"
        ) from error
    wrong = [*(name for name in missing if not name.endswith("num_batches_tracked")), *unknown]
    if wrong:
        raise UserError(
            f"{path} does not fit the network it describes: {wrong[0]} is missing or unknown"
        )

"""From a name, a model YAML or a checkpoint's YAML to an Ultralytics network with random weights.

A model YAML names the layers Ultralytics is to build, and Ultralytics looks those names up among
everything its module holds and evaluates the `activation` entry as Python. A YAML may come out of
a checkpoint nobody vouches for, so `checked_yaml` lets only layers and plain activations through.
"""

from __future__ import annotations

import copy
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from ultralytics import __version__ as ULTRALYTICS_VERSION
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv, Detect
from ultralytics.utils import DEFAULT_CFG, LOGGER, SETTINGS
from ultralytics.utils.downloads import (
    GITHUB_ASSETS_NAMES,
    attempt_download_asset,
    safe_download,
)
from ultralytics.utils.torch_utils import initialize_weights

from ..errors import UserError

_PROBE_SECONDS = 5.0
_YOLOV5_RELEASE = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
_DETECTION_HEADS = ("Detect", "v10Detect")

# Ultralytics' word for a task, in class names, layer names and file names; first match counts.
_OTHER_TASKS = (
    (r"yoloe|world", "an open-vocabulary network (its classes come from text)"),
    (r"rt-?detr", "an RT-DETR network (a transformer decoder without anchor points)"),
    (r"semantic|-sem\b", "a semantic segmentation network"),
    (r"segment|-seg\b", "an instance segmentation network"),
    (r"pose", "a pose estimation network"),
    (r"obb", "an oriented-box network"),
    (r"classif|-cls\b", "a classification network"),
    (r"depth", "a depth estimation network"),
    (r"yolo_?nas", "a YOLO-NAS network"),
    (r"sam", "a promptable segmentation network"),
)


def other_task(name: str) -> str | None:
    """What a class, layer or file name of Ultralytics says it is; None where it detects boxes."""
    for pattern, description in _OTHER_TASKS:
        if re.search(pattern, name, re.IGNORECASE):
            return description
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Ultralytics from logging anything but errors."""
    level = LOGGER.level
    LOGGER.setLevel("ERROR")
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def read_yaml(name: str | Path) -> dict[str, Any]:
    """The model YAML at a path, or the one Ultralytics ships under that name ("yolo11n.yaml").

    The letter of the size in the name ("n" of "yolo11n") becomes the key `scale`.

    Raises:
        UserError: there is no such file and none is shipped, or it is not YAML.
    """
    if "://" in str(name):
        raise UserError(f"{name} is a web address: download the file and pass its path")
    try:
        with quiet():
            return tasks.yaml_model_load(name)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no file {name}, and Ultralytics {ULTRALYTICS_VERSION} ships no model YAML "
            "of that name: check the spelling (e.g. yolo11n.yaml)"
        ) from error
    except Exception as error:
        raise UserError(f"{name} cannot be read as a model YAML: {_one_line(error)}") from error


def checked_yaml(yaml: Any, source: str) -> dict[str, Any]:
    """A JSON-like copy of a model YAML that names nothing but layers of a detector.

    Args:
        yaml: what a YAML file or a checkpoint holds.
        source: what to call it in messages.

    Raises:
        UserError: it is no model YAML, describes another task, takes other than three channels,
            or names something that is not a layer of this Ultralytics.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(yaml))
        rows = [*plain["backbone"], *plain["head"]]
        layers = [str(row[2]) for row in rows]
        int(plain["nc"])
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{source} holds no Ultralytics model description (nc, backbone and head, each row "
            "[from, number, module, args]): name a model YAML or a checkpoint of a YOLO detector"
        ) from error
    head = layers[-1]
    if head not in _DETECTION_HEADS:
        what = other_task(head) or f"a network that ends in {head}"
        raise UserError(f"{source} is {what}: name an object detector (head Detect or v10Detect)")
    channels = plain.get("channels", plain.get("ch", 3))
    if channels != 3:
        raise UserError(f"{source} takes images of {channels} channels: only RGB detectors work")
    for layer in dict.fromkeys(layers):
        if not _is_layer(layer):
            raise UserError(
                f"{source} needs the layer {layer}, which Ultralytics {ULTRALYTICS_VERSION} does "
                "not have: install the version that the model was made with"
            )
    activation = plain.get("activation")
    if activation is not None and not _is_activation(activation):
        raise UserError(
            f"{source} sets the activation to {activation!r}: write it as torch.nn.NAME(numbers)"
        )
    return plain


def _is_layer(name: str) -> bool:
    if name.startswith("nn."):
        found = getattr(nn, name.removeprefix("nn."), None)
    elif name.startswith("torchvision.ops."):
        found = getattr(torchvision.ops, name.removeprefix("torchvision.ops."), None)
    else:
        found = getattr(tasks, name, None)
    return isinstance(found, type) and issubclass(found, nn.Module)


def _is_activation(text: Any) -> bool:
    # No brackets, quotes or calls among the arguments: nothing that evaluating could run.
    match = re.fullmatch(r"(?:torch\.)?nn\.(\w+)\([\w\s=,.+-]*\)", str(text))
    return match is not None and _is_layer(f"nn.{match[1]}")


def build(yaml: dict[str, Any], source: str, *, legacy_head: bool | None = None) -> nn.Module:
    """The network a checked YAML describes: random weights, always the same ones, eval, frozen.

    The caller's random state is left as it was.

    Args:
        yaml: from `checked_yaml`.
        source: what to call it in messages.
        legacy_head: whether the head's class branch starts with a plain convolution; None leaves
            it to Ultralytics. See `ultralytics_weights.has_legacy_head`.

    Raises:
        UserError: Ultralytics cannot build it.
    """
    activation = Conv.default_act
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module = tasks.DetectionModel(copy.deepcopy(yaml), ch=3, verbose=False)
            head = module.model[-1]
            # Ultralytics notes it on the class, where the next network's overwrites it.
            head.legacy = type(head) is Detect and Detect.legacy
            if legacy_head is not None and type(head) is Detect:
                _set_class_branch(module, legacy_head)
    except Exception as error:
        raise UserError(
            f"Ultralytics {ULTRALYTICS_VERSION} cannot build {source}: {_one_line(error)}"
        ) from error
    finally:
        # A YAML's activation is set for the process; some versions leave it so, all do on errors.
        Conv.default_act = activation
    module.args = copy.copy(DEFAULT_CFG)
    for layer in module.modules():
        # An activation in place would overwrite the BatchNorm output that feature hooks hold.
        if type(layer).__module__.startswith("torch.nn.") and getattr(layer, "inplace", False):
            layer.inplace = False
    return module.eval().requires_grad_(False)


def _set_class_branch(module: nn.Module, legacy: bool) -> None:
    head = module.model[-1]
    if head.legacy == legacy:
        return
    channels = [branch[0].conv.in_channels for branch in head.cv2]
    two_branches = getattr(head, "one2one_cv3", None) is not None
    kind = type("Detect", (Detect,), {"legacy": legacy})
    other = kind(head.nc, head.reg_max, two_branches, channels)
    head.legacy = legacy
    head.cv3 = other.cv3
    if two_branches:
        head.one2one_cv3 = other.one2one_cv3
    head.bias_init()
    initialize_weights(module)


def is_published(name: str) -> bool:
    """Whether `name` ("yolo11s", "yolov5n.pt") is a checkpoint that Ultralytics publishes."""
    return _original_yolov5(name) or f"{name.removesuffix('.pt')}.pt" in GITHUB_ASSETS_NAMES


def _original_yolov5(name: str) -> bool:
    return re.fullmatch(r"yolov5[nsmlx]6?(\.pt)?", name) is not None


def fetch(name: str) -> Path:
    """The file of a published checkpoint, downloaded once into Ultralytics' weights folder.

    `yolov5n` is the original anchor-based network; Ultralytics' anchor-free one is `yolov5nu`.

    Raises:
        UserError: it is no detector, or there is no network.
    """
    what = other_task(name)
    if what is not None:
        raise UserError(f"{name} is {what}: name an object detector, e.g. yolo11n")
    file = f"{name.removesuffix('.pt')}.pt"
    folder = Path(SETTINGS["weights_dir"]).resolve()
    path = folder / file
    if path.is_file():
        return path
    try:
        if os.environ.get("YOLO_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise ConnectionError("YOLO_OFFLINE is set")
        _probe("https://github.com")
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            if _original_yolov5(name):
                safe_download(f"{_YOLOV5_RELEASE}/{file}", file=path, min_bytes=1e5, retry=1)
            else:
                attempt_download_asset(path, retry=1)
    except (OSError, MemoryError) as error:
        raise UserError(
            f"{file} could not be downloaded ({_one_line(error)}): "
            f"put the file into {folder}, or pass the path of a copy"
        ) from error
    if not path.is_file():
        raise UserError(f"{file} could not be downloaded: pass the path of a copy")
    return path


def _probe(address: str) -> None:
    # Ultralytics waits 30 seconds a try for a connection; a missing network shows much sooner.
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except urllib.error.URLError as error:
        raise ConnectionError(f"no connection to {address}: {error.reason}") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."

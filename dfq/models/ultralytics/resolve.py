"""From a name, a model YAML or a checkpoint's YAML to an Ultralytics network with random weights.

A YAML may come out of a checkpoint nobody vouches for, and Ultralytics evaluates parts of it:
`checked_yaml` lets only known layers, numbers and known activations through, and `build` tries what
they ask for where it costs nothing, before it is made.
"""

from __future__ import annotations

import copy
import functools
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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

from ...errors import UserError, shown
from ...runtime.plain import brief, one_line, parse_yaml, plain_tree, read_small
from ...runtime.suggest import suggestion
from ..activations import parse, torch_text
from ..bounded import bounded
from .layers import KEYS, checked_rows, is_known
from .layout import IMAGE, as_tuple, gather, wiring

_PROBE_SECONDS = 5.0
_TRIED = 256
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
    path = _yaml_file(Path(name))
    if path is None:
        near = suggestion(Path(name).name, [p.name for p in _shipped()])
        raise UserError(
            f"there is no file {shown(str(name))}, and Ultralytics {ULTRALYTICS_VERSION} ships no "
            f"model YAML of that name: check the spelling (e.g. yolo11n.yaml){near}"
        )
    yaml = parse_yaml(read_small(path), str(name))
    if not isinstance(yaml, dict):
        raise UserError(f"{name} holds no Ultralytics model description: it is {brief(yaml)}")
    yaml["scale"] = tasks.guess_model_scale(name)
    yaml["yaml_file"] = str(name)
    return yaml


def _yaml_file(path: Path) -> Path | None:
    """The file of that name, or the one Ultralytics ships for all sizes of it."""
    if path.is_file():
        return path
    # As Ultralytics has it: yolov8x6 is the size x of yolov8-p6, yolov5nu the same as yolov5n.
    stem = re.sub(r"^(yolov[58])([nslmx])6$", r"\1\2-p6", path.stem)
    stem = re.sub(r"^(yolov[35].*)u$", r"\1", stem)
    unified = re.sub(r"(\d+)([nslmx])(.+)?$", r"\1\3", stem)
    if path.name != str(path):
        return None
    for name in (f"{stem}{path.suffix}", f"{unified}{path.suffix}"):
        for file in _shipped():
            if file.name == name:
                return file
    return None


@functools.cache
def _shipped() -> tuple[Path, ...]:
    """Every YAML of Ultralytics, those of models first."""
    root = Path(tasks.__file__).parents[1] / "cfg"
    return (*sorted((root / "models").rglob("*.yaml")), *sorted((root / "datasets").glob("*.yaml")))


def checked_yaml(yaml: Any, source: str) -> dict[str, Any]:
    """A JSON-like copy of a model YAML that names nothing but layers of a detector.

    Args:
        yaml: what a YAML file or a checkpoint holds.
        source: what to call it in messages.

    Raises:
        UserError: it is no model YAML, describes another task, takes other than three channels,
            names something that is not a layer of this Ultralytics or gives a layer what it does
            not take, or asks for more than `limits` allows.
    """
    tree = plain_tree(yaml, source)
    if not _is_description(tree):
        raise UserError(
            f"{source} holds no Ultralytics model description (nc, backbone and head, each row "
            "[from, number, module, args]): name a model YAML or a checkpoint of a YOLO detector"
        )
    plain: dict[str, Any] = {key: tree[key] for key in KEYS if key in tree}
    rows = [*plain["backbone"], *plain["head"]]
    if rows[0][2] == "Silence":
        # What YOLOv9 called it before it was torch's own.
        rows[0][2] = "nn.Identity"
    layers = [row[2] for row in rows]
    head = layers[-1]
    if head not in _DETECTION_HEADS:
        network = other_task(head) or f"a network that ends in {brief(head)}"
        raise UserError(
            f"{source} is {network}: name an object detector (head Detect or v10Detect)"
        )
    channels = plain.get("channels", plain.get("ch", 3))
    if channels != 3:
        raise UserError(
            f"{source} takes images of {brief(channels)} channels: only RGB detectors work"
        )
    for layer in dict.fromkeys(layers):
        if not is_known(layer) or not _is_there(layer):
            raise UserError(
                f"{source} needs the layer {brief(layer).strip(QUOTES)}, which is no layer of a "
                f"detector of Ultralytics {ULTRALYTICS_VERSION}: install the version that the "
                "model was made with, if it is one of another"
            )
    if any(layer in _DETECTION_HEADS for layer in layers[:-1]):
        raise UserError(f"{source} has a head among its layers: only its last one may be one")
    checked_rows(plain, source)
    if plain.get("activation") is not None:
        try:
            plain["activation"] = torch_text(parse(plain["activation"]))
        except UserError as error:
            raise UserError(f"{source} sets the activation: {error}") from None
    return plain


QUOTES = "'\""


def _is_description(tree: Any) -> bool:
    if not isinstance(tree, dict) or type(tree.get("nc")) is not int:
        return False
    parts = [tree.get("backbone"), tree.get("head")]
    return all(
        isinstance(part, list)
        and part
        and all(isinstance(r, list) and len(r) == 4 and isinstance(r[2], str) for r in part)
        for part in parts
    )


def _is_there(layer: str) -> bool:
    """Whether the installed version has it."""
    layer_class = (
        getattr(nn, layer[3:], None) if layer[:3] == "nn." else getattr(tasks, layer, None)
    )
    return isinstance(layer_class, type) and issubclass(layer_class, nn.Module)


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
        _try(yaml, source)
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module = tasks.DetectionModel(copy.deepcopy(yaml), ch=3, verbose=False)
            head = module.model[-1]
            # Ultralytics notes it on the class, where the next network's overwrites it.
            head.legacy = type(head) is Detect and Detect.legacy
            if legacy_head is not None and type(head) is Detect:
                _set_class_branch(module, legacy_head)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"Ultralytics {ULTRALYTICS_VERSION} cannot build {source}: {one_line(error)}"
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


def _try(yaml: dict[str, Any], source: str) -> None:
    """Build the network, and run it, where tensors have no numbers: what it asks for is found out
    at once, and nothing of it is made."""
    with quiet(), torch.device("meta"), torch.no_grad(), bounded(source):
        layers = tasks.parse_model(copy.deepcopy(yaml), 3, verbose=False)[0].eval()
        inputs = wiring(layers)
        outputs: dict[int, Any] = {IMAGE: torch.empty(1, 3, _TRIED, _TRIED)}
        for index, layer in enumerate(list(layers)[:-1]):
            outputs[index] = layer(gather(outputs, inputs[index]))
        head, features = layers[-1], [outputs[index] for index in as_tuple(inputs[-1])]
        for branches in (head.cv2, head.cv3):
            for branch, feature in zip(branches, features, strict=True):
                branch(feature)


def _set_class_branch(module: nn.Module, legacy: bool) -> None:
    head = module.model[-1]
    if head.legacy == legacy:
        return
    channels = [branch[0].conv.in_channels for branch in head.cv2]
    two_branches = getattr(head, "one2one_cv3", None) is not None
    kind = type("Detect", (Detect,), {"legacy": legacy})
    rebuilt = kind(head.nc, head.reg_max, two_branches, channels)
    head.legacy = legacy
    head.cv3 = rebuilt.cv3
    if two_branches:
        head.one2one_cv3 = rebuilt.one2one_cv3
    head.bias_init()
    initialize_weights(module)


def is_published(name: str) -> bool:
    """Whether `name` ("yolo11s", "yolov5n.pt") is a checkpoint that Ultralytics publishes."""
    return _original_yolov5(name) or f"{name.removesuffix('.pt')}.pt" in GITHUB_ASSETS_NAMES


def published() -> list[str]:
    """Names of the detectors that Ultralytics publishes."""
    names = [name.removesuffix(".pt") for name in sorted(GITHUB_ASSETS_NAMES)]
    return [name for name in names if name.startswith("yolo") and other_task(name) is None]


def _original_yolov5(name: str) -> bool:
    return re.fullmatch(r"yolov5[nsmlx]6?(\.pt)?", name) is not None


def fetch(name: str) -> Path:
    """The file of a published checkpoint, downloaded once into Ultralytics' weights folder.

    `yolov5n` is the original anchor-based network; Ultralytics' anchor-free one is `yolov5nu`.

    Raises:
        UserError: it is no detector, or there is no network.
    """
    task = other_task(name)
    if task is not None:
        raise UserError(f"{name} is {task}: name an object detector, e.g. yolo11n")
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
            f"{file} could not be downloaded ({one_line(error)}): "
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

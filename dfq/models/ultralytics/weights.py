"""What an Ultralytics checkpoint says about its network, and its tensors."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from torch import Tensor, nn

from ...errors import UserError, shown
from ...runtime.plain import brief
from ..checkpoint import Checkpoint, attribute, find_model, modules_of, state_dict_of
from ..coco_categories import COCO_NAMES
from ..metadata import image_side, listed_names
from ..rebuilt import Changes, check_layers, take_over_activations
from ..tensors import check_kinds, refuse_pruned
from .resolve import ULTRALYTICS_VERSION


def category_names(names: Any, count: int, source: str) -> list[str]:
    """Category names by index; without any, their numbers.

    Ultralytics' own YAMLs have 80 categories and no names: they describe COCO's, in the order of
    its `coco.yaml`.

    Args:
        names: a list, or a mapping of indices.
        count: of the network's categories.
        source: for messages.

    Raises:
        UserError: they are no names, or not one for each category.
    """
    if names is None or (isinstance(names, list | tuple | dict) and not names):
        return list(COCO_NAMES) if count == 80 else [str(index) for index in range(count)]
    names = listed_names(names, source)
    if len(names) != count:
        raise UserError(
            f"{source} has {len(names)} category names and {count} categories: give both the same "
            "number"
        )
    return names


def training_size(model: Any, root: Any, source: str) -> int:
    """The side the network was trained at, 640 where the checkpoint does not say.

    Raises:
        UserError: it is no size in pixels.
    """
    candidates = [attribute(model, "args")]
    if isinstance(root, dict):
        candidates.append(root.get("train_args"))
    for arguments in candidates:
        if not isinstance(arguments, dict):
            arguments = getattr(arguments, "state", None) or getattr(arguments, "__dict__", {})
        if (size := arguments.get("imgsz")) is not None:
            return image_side(size, source)
    return 640


def has_legacy_head(checkpoint: Checkpoint) -> bool | None:
    """Whether the class branch of the head starts with a plain convolution (v3, v5, v8, v9) and
    not with a depthwise one (from YOLO11 on); None where it is neither.

    The YAML does not tell: 8.3.0 and the versions soon after it built every head the new way.
    """
    for name, _ in modules_of(find_model(checkpoint)):
        match = re.fullmatch(r"model\.\d+\.cv3\.0\.0(\.0)?\.conv", name)
        if match:
            return match[1] is None
    return None


def load_strictly(module: nn.Module, checkpoint: Checkpoint) -> Changes:
    """Fill `module` with the checkpoint's tensors, every one, and its activations.

    Returns:
        The activations that are others than the checkpoint's YAML gives.

    Raises:
        UserError: the checkpoint is fused, does not fit the module, or computes something else.
    """
    source = str(checkpoint.path)
    model = find_model(checkpoint)
    state = state_dict_of(model, source)
    if not any(name.endswith("running_mean") for name in state):
        raise UserError(
            f"{source} is fused (BatchNorm is folded into the convolutions), and its statistics "
            "are what synthesis needs: name the checkpoint that the training wrote"
        )
    parts = dict(modules_of(model))
    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and name in parts:
            eps = attribute(parts[name], "eps", layer.eps)
            if type(eps) not in (int, float) or eps != layer.eps:
                raise UserError(
                    f"{source} has the BatchNorm constant {brief(eps)} in {name}, where "
                    f"Ultralytics has {layer.eps}: train it with Ultralytics' own value"
                )
    # Before the shapes are compared: an activation may have weights of its own.
    changes = take_over_activations(module, model, source)
    refuse_pruned(module.state_dict(), state, source)
    wrong = _differences(module.state_dict(), state)
    if wrong:
        root = checkpoint.root
        version = root.get("version") if isinstance(root, dict) else None
        written = f", written by Ultralytics {shown(version)}," if isinstance(version, str) else ""
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"{source}{written} does not fit the installed Ultralytics {ULTRALYTICS_VERSION} "
            f"({wrong[0]}{more}): install the version that wrote it"
        )
    check_layers(module, model, source)
    check_kinds(module.state_dict(), state, source)
    module.load_state_dict(state)
    return changes


def _differences(expected: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{shown(name)} is unknown" for name in state if name not in expected]
    wrong += [
        f"{name} has the shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    return wrong


def fingerprint_of(module: nn.Module) -> str:
    """SHA-256 (hex) of the names and bytes of all tensors of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

"""What an Ultralytics checkpoint says about its network, and its tensors."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from .checkpoint import (
    Checkpoint,
    attribute,
    class_of,
    find_model,
    modules_of,
    state_dict_of,
)
from .ultralytics_resolve import ULTRALYTICS_VERSION

from ultralytics.utils import YAML  # isort: skip  # after YOLO_VERBOSE is set
from ultralytics.utils.checks import check_yaml  # isort: skip

# Activations without parameters, which a checkpoint may carry where its YAML says nothing of them.
_PLAIN_ACTIVATIONS = {
    f"torch.nn.modules.{where}": kind
    for where, kind in {
        "activation.SiLU": nn.SiLU,
        "activation.ReLU": nn.ReLU,
        "activation.Hardswish": nn.Hardswish,
        "activation.Mish": nn.Mish,
        "linear.Identity": nn.Identity,
    }.items()
}


def category_names(names: Any, count: int) -> list[str]:
    """Category names by index; the index itself where a name is missing.

    Ultralytics' own YAMLs have 80 categories and no names: they describe COCO's, in the order of
    its `coco.yaml`.
    """
    if not names and count == 80:
        names = YAML.load(check_yaml("coco.yaml"))["names"]
    if isinstance(names, (list, tuple)):
        names = dict(enumerate(names))
    elif not isinstance(names, dict):
        names = {}
    by_index = {str(index): str(name) for index, name in names.items()}
    return [by_index.get(str(index), str(index)) for index in range(count)]


def training_size(model: Any, root: Any) -> int:
    """The side the network was trained at, 640 where the checkpoint does not say."""
    candidates = [attribute(model, "args")]
    if isinstance(root, dict):
        candidates.append(root.get("train_args"))
    for arguments in candidates:
        if not isinstance(arguments, dict):
            arguments = getattr(arguments, "state", None) or getattr(arguments, "__dict__", {})
        size = arguments.get("imgsz")
        if isinstance(size, (list, tuple)) and size:
            size = max(size)
        if isinstance(size, int) and size > 0:
            return size
    return 640


def has_legacy_head(checkpoint: Checkpoint) -> bool | None:
    """Whether the class branch of the head starts with a plain convolution (v3, v5, v8, v9) and
    not with a depthwise one (from YOLO11 on); None where it is neither.

    The YAML does not tell: 8.3.0 and the versions soon after it built every head the new way.
    """
    for name in state_dict_of(find_model(checkpoint)):
        match = re.fullmatch(r"model\.\d+\.cv3\.0\.0(\.0)?\.conv\.weight", name)
        if match:
            return match[1] is None
    return None


def load_strictly(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Fill `module` with the checkpoint's tensors, every one.

    Raises:
        UserError: the checkpoint is fused or does not fit the module.
    """
    source = checkpoint.path
    model = find_model(checkpoint)
    state = state_dict_of(model)
    if not any(name.endswith("running_mean") for name in state):
        raise UserError(
            f"{source} is fused (BatchNorm is folded into the convolutions), and its statistics "
            "are what synthesis needs: name the checkpoint that the training wrote"
        )
    wrong = _differences(module.state_dict(), state)
    if wrong:
        root = checkpoint.root
        version = root.get("version") if isinstance(root, dict) else None
        written = f", written by Ultralytics {version}," if version else ""
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"{source}{written} does not fit the installed Ultralytics {ULTRALYTICS_VERSION} "
            f"({wrong[0]}{more}): install the version that wrote it"
        )
    for name, part in modules_of(model):
        own = module.get_submodule(name)
        # A block's default activation differs between versions of Ultralytics; the tensors do not
        # tell, so the one it was trained with is taken over.
        activation = _PLAIN_ACTIVATIONS.get(class_of(part))
        if name.endswith(".act") and activation and not isinstance(own, activation):
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, activation())
        if isinstance(own, nn.BatchNorm2d) and attribute(part, "eps", own.eps) != own.eps:
            raise UserError(
                f"{source} has the BatchNorm constant {attribute(part, 'eps')} in {name}, where "
                f"Ultralytics has {own.eps}: train it with Ultralytics' own value"
            )
    module.load_state_dict(state)


def _differences(expected: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    wrong = [f"{name} is missing" for name in expected if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in expected]
    wrong += [
        f"{name} has the shape {tuple(given[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    return wrong


def fingerprint_of(module: nn.Module) -> str:
    """SHA-256 (hex) of the names and bytes of all tensors of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

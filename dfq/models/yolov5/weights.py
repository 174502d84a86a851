"""What a YOLOv5 checkpoint says about its network, and its tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...errors import UserError, shown
from ...runtime.plain import brief, one_line
from ..activations import describe, known
from ..checkpoint import Checkpoint, Inert, attribute, class_of, modules_of, state_dict_of
from ..metadata import image_side, listed_names, require_names
from ..rebuilt import check_layers, take_over_activations
from ..tensors import check_kinds, refuse_pruned, sound
from .blocks import BN_EPS
from .network import YOLOv5Network


def head_of(model: Inert | nn.Module, checkpoint: Checkpoint) -> Inert | nn.Module:
    """The detection head.

    Raises:
        UserError: there is none, or one of another task.
    """
    kinds = {class_of(module).rpartition(".")[2]: module for _, module in modules_of(model)}
    for kind, task in (("Classify", "classification"), ("Segment", "segmentation")):
        if kind in kinds:
            raise UserError(
                f"{checkpoint.path} is a YOLOv5 {task} model: "
                "of YOLOv5, only detection models are supported"
            )
    if "Detect" not in kinds:
        raise UserError(f"{checkpoint.path} has no YOLOv5 detection head (Detect): unsupported")
    return kinds["Detect"]


def activation_of(model: Inert | nn.Module, checkpoint: Checkpoint) -> str:
    """The activation of the network, with its arguments.

    Raises:
        UserError: it has several, or one that is not known.
    """
    activations: dict[str, str | None] = {}
    for name, module in modules_of(model):
        if name.endswith(".act"):
            try:
                text = describe(module)
            except UserError as error:
                raise UserError(f"{checkpoint.path}: {name}: {error}") from None
            activations[text or class_of(module).rpartition(".")[2]] = text
    texts = [text for text in activations.values() if text is not None]
    if len(activations) != 1 or len(texts) != 1:
        kinds = sorted(shown(text.removesuffix("()")) for text in activations)
        raise UserError(
            f"{checkpoint.path} uses the activations {', '.join(kinds) or 'none'}: "
            f"supported is one, the same throughout, of {known()}"
        )
    return texts[0]


def names_of(names: Any, head: Any, source: str) -> list[str]:
    """Category names by index, one for each category of the head.

    Raises:
        UserError: they are none, or more or fewer.
    """
    if not isinstance(names, dict | list | tuple) or not names:
        raise UserError(f"{source} holds no category names: it is damaged or no YOLOv5")
    names = listed_names(names, source)
    require_names(names, attribute(head, "nc", len(names)), source)
    return names


def training_size(root: Any, stride: int, source: str) -> int:
    """The side the network was trained at.

    Raises:
        UserError: what the checkpoint says is none.
    """
    options = root.get("opt") if isinstance(root, dict) else None
    if isinstance(options, Inert):
        options = options.state
    size = options.get("imgsz") if isinstance(options, dict) else None
    if size is not None:
        return image_side(size, source)
    # Released checkpoints do not say; those with a fourth level were trained at 1280.
    return 1280 if stride > 32 else 640


def sound_anchors(anchors: Tensor, source: str) -> Tensor:
    """Anchors as float32, of the shape that they have.

    Raises:
        UserError: they are not all finite and above zero.
    """
    anchors = sound({"anchors": anchors.detach()}, source)["anchors"].float()
    if not (anchors > 0).all():
        raise UserError(f"{source}: its anchors are not all above zero: it is damaged")
    return anchors


def are_strides(stored: Any, strides: list[int]) -> bool:
    """Whether what a checkpoint holds as strides is these."""
    if isinstance(stored, Tensor):
        stored = stored.tolist() if stored.numel() == len(strides) else []
    if not isinstance(stored, list | tuple) or len(stored) != len(strides):
        return False
    return all(isinstance(g, int | float) and g == s for g, s in zip(stored, strides, strict=True))


def load(network: YOLOv5Network, model: Inert | nn.Module, checkpoint: Checkpoint) -> None:
    """Load weights strictly, and the BatchNorm constants, which are no weights.

    Raises:
        UserError: the checkpoint is fused, does not fit, or computes something else.
    """
    source = str(checkpoint.path)
    # v5.0 and v6.0 keep the anchors twice, the second time in pixels.
    tensors = state_dict_of(model, source)
    state = {k: v for k, v in tensors.items() if not k.endswith(".anchor_grid")}
    if not any(key.endswith(".running_mean") for key in state):
        raise UserError(
            f"{source} has its BatchNorm fused into the convolutions, so the statistics "
            "that synthesis inverts are gone: name the checkpoint that the training wrote"
        )
    # Activations may have weights; a checkpoint's may differ past its description.
    take_over_activations(network, model, source)
    check_kinds(network.state_dict(), state, source)
    refuse_pruned(network.state_dict(), state, source)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        # The first line says that there are some.
        wrong = one_line(RuntimeError(str(error).partition("\n")[2] or error))
        raise UserError(
            f"the weights in {source} do not fit its architecture description ({wrong})"
        ) from error
    check_layers(network, model, source)
    constants = {
        name: attribute(module, "eps", BN_EPS)
        for name, module in modules_of(model)
        if class_of(module).endswith(".BatchNorm2d")
    }
    set_eps(network, constants, source)


def set_eps(network: YOLOv5Network, constants: Any, source: str) -> None:
    """Set the constants of BatchNorms, by their names.

    Raises:
        UserError: there is no such BatchNorm, or a constant is none.
    """
    modules = dict(network.named_modules())
    if not isinstance(constants, dict):
        raise UserError(f"{source}: its BatchNorm constants are {brief(constants)}")
    for name, eps in constants.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.BatchNorm2d):
            raise UserError(f"{source}: {brief(name)} is no BatchNorm")
        if type(eps) not in (int, float) or not 0 <= eps < 1e6:
            raise UserError(
                f"{source}: the BatchNorm {name} has {brief(eps)} for its eps, which is no "
                "number from 0 on"
            )
        layer.eps = float(eps)

"""What a checkpoint's network computes beyond its tensors, brought into the one rebuilt from its
description.

Activations may have been set in code, past the description: they are taken over, with their
arguments. Whatever else differs between two layers of one name and shape (a stride, a pooling's
size, whether a block adds its input) is refused: the tensors would load, and the network compute
something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import UserError, shown
from ..runtime.plain import brief
from . import activations
from .checkpoint import attribute, class_of, modules_of

Changes = dict[str, list[str]]
"""Activation, as `activations.describe` writes it, -> the modules that have it."""

# What PyTorch's layers note for themselves and does not change what they give in evaluation.
_FREE = {"inplace", "momentum", "name", "p", "training", "recompute_scale_factor"}
# Of blocks: whether they add their input, what they concatenate along, how they attend, whose
# outputs they take.
_OF_BLOCKS = ("add", "d", "f", "area", "num_heads", "head_dim", "key_dim", "scale", "n")


def take_over_activations(network: nn.Module, model: Any, source: str) -> Changes:
    """Give a rebuilt network the activations of a checkpoint's, in place.

    Args:
        network: rebuilt; its tensors need not be loaded yet.
        model: the checkpoint's, real or inert.
        source: of the checkpoint, for messages.

    Returns:
        The activations that were changed.

    Raises:
        UserError: an activation is not known.
    """
    theirs = dict(modules_of(model))
    changes: Changes = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if activations.is_listed(module):
            text = _activation(theirs.get(name), module, name, source)
            if text != activations.describe(module):
                changes.setdefault(text, []).append(name)
    apply_changes(network, changes, source)
    return changes


def check_layers(network: nn.Module, model: Any, source: str) -> None:
    """Refuse a checkpoint whose layers compute something else than the rebuilt network's of the
    same names and shapes.

    Args:
        network, model, source: as for `take_over_activations`, whose work is done.

    Raises:
        UserError: names the first such layer.
    """
    theirs = dict(modules_of(model))
    for name, module in network.named_modules():
        part = theirs.get(name)
        if part is not None and name and not activations.is_listed(module):
            _check_layer(module, part, name, source)


def apply_changes(network: nn.Module, changes: Any, source: str) -> None:
    """Put activations in the places of others, in place.

    Args:
        network: the network.
        changes: what `take_over` gave, or a description holds.
        source: for messages.

    Raises:
        UserError: an activation is not known, or there is none of that name to change.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    if not isinstance(changes, Mapping):
        raise UserError(f"{source}: its activations are {brief(changes)}, not a mapping")
    for text, names in changes.items():
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or not activations.is_listed(modules.get(name)):
                raise UserError(f"{source}: changes the activation {brief(name)}, which is none")
            try:
                module = activations.make(activations.parse(text))
            except UserError as error:
                raise UserError(f"{source}: {name}: {error}") from None
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, module.requires_grad_(False))


def _activation(part: Any, module: nn.Module, name: str, source: str) -> str:
    if part is None:
        if isinstance(module, nn.Identity):
            # Newer versions have a place for one where older ones have nothing.
            return str(activations.describe(module))
        raise UserError(f"{source} has no activation in {name}, or one that is no module: refused")
    try:
        text = activations.describe(part)
    except UserError as error:
        raise UserError(f"{source}: {name}: {error}") from None
    if text is None:
        raise UserError(
            f"{source} has the activation {shown(class_of(part))} in {name}, which is not "
            f"supported: supported are {activations.known()}"
        )
    return text


def _check_layer(module: nn.Module, part: Any, name: str, source: str) -> None:
    class_name = class_of(part)
    of_torch = type(module).__module__.startswith("torch.nn.")
    if of_torch or class_name.startswith("torch.nn."):
        kind = class_name.rpartition(".")[2]
        alike = kind in (cls.__name__ for cls in type(module).__mro__)
        if not alike or (of_torch and not class_name.startswith("torch.nn.")):
            raise UserError(
                f"{source} has a {shown(kind)} in {name}, where its description gives a "
                f"{type(module).__name__}: the network was changed past its description"
            )
        keys = [key for key in getattr(type(module), "__constants__", ()) if key not in _FREE]
    else:
        keys = [key for key in _OF_BLOCKS if key in vars(module)]
    for key in keys:
        ours, theirs = getattr(module, key, None), attribute(part, key, getattr(module, key, None))
        if key == "eps" and isinstance(module, nn.BatchNorm2d):
            # Each family has its own way with it.
            continue
        if not _same(ours, theirs):
            raise UserError(
                f"{source} has {key} {_argument(theirs)} in {name}, where its description gives "
                f"{_argument(ours)}: the network was changed past its description"
            )


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two arguments of a layer say the same; PyTorch spreads one number over dimensions."""
    if isinstance(ours, list | tuple) or isinstance(theirs, list | tuple):
        size = max(len(part) for part in (ours, theirs) if isinstance(part, list | tuple))
        first, second = (
            list(part) if isinstance(part, list | tuple) else [part] * min(size, 8)
            for part in (ours, theirs)
        )
        return len(first) == len(second) and all(map(_equal, first, second))
    return _equal(ours, theirs)


def _equal(ours: Any, theirs: Any) -> bool:
    if not isinstance(ours, int | float | str | type(None)):
        return True
    return isinstance(theirs, int | float | str | type(None)) and bool(ours == theirs)


def _argument(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) < 5:
        return f"({', '.join(_argument(part) for part in value)})"
    return brief(value)

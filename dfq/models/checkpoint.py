"""Reading a detector's checkpoint without running anything that is in it.

A `.pt` file is a pickle: loading it the ordinary way imports and calls whatever it names. Here it
goes through `restricted_pickle`, and what comes out is examined by the functions below, which take
real modules (of a trusted file) and `Inert` stand-ins alike.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, shown
from ..runtime.files import reason
from ..runtime.limits import DEEPEST, MOST_MODULES, MOST_TENSORS
from ..runtime.plain import brief
from .archive import MAGIC, storages_of
from .pickle_table import Inert
from .restricted_pickle import restricted_pickle
from .tensors import is_counter, sound, unprefixed

__all__ = [
    "Checkpoint",
    "Inert",
    "attribute",
    "children_of",
    "class_of",
    "find_model",
    "holds_no_module",
    "modules_of",
    "read_checkpoint",
    "sha256_of",
    "state_dict_of",
    "tensors_of",
]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read.

    Attributes:
        path: the file.
        sha256: hexadecimal digest of the file.
        root: the object in it, with `Inert` in the place of modules (or, where the file was
            trusted, with the real ones).
    """

    path: Path
    sha256: str
    root: Any


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file as hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """Read a PyTorch checkpoint, of the zip format or the one before PyTorch 1.6, onto the CPU.

    Args:
        path: the file.
        trust: load it the ordinary way instead, which imports the real classes and runs what the
            file says. Only for files whose author is trusted.

    Raises:
        UserError: the file is missing, unreadable, damaged, no checkpoint, a TorchScript archive,
            or asks for a name that no checkpoint needs.
    """
    path = Path(path)
    data = _bytes_of(path)
    storages = _storages(path, data)
    options: dict[str, Any] = {}
    if not trust:
        options["pickle_module"] = restricted_pickle(str(path), storages)
    # From memory, so that what was hashed and examined is what is loaded. It also keeps torch from
    # unpacking tar archives (the format of 2016) to disk.
    try:
        root = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False, **options)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{path} needs Python code that is not installed ({error}): "
            "read it without --trust, or install that code"
        ) from error
    except Exception as error:
        raise UserError(_unreadable(path, data)) from error
    return Checkpoint(path, hashlib.sha256(data).hexdigest(), root)


def _bytes_of(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the checkpoint file (.pt) in it")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}: check the path") from error
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {reason(error)}") from error
    if not data:
        raise UserError(f"{path} is empty: download or copy the checkpoint again")
    return data


def _storages(path: Path, data: bytes) -> dict[str, int] | int:
    """What is known of the file's storages, see `restricted_pickle`."""
    if not data.startswith(MAGIC):
        # Of the format before PyTorch 1.6.
        return len(data)
    try:
        return storages_of(path, data)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_unreadable(path, data)) from error


def _unreadable(path: Path, data: bytes) -> str:
    # 0x80 opens every binary pickle, and so the older checkpoint format.
    if data.startswith((MAGIC, b"\x80")):
        return (
            f"{path} is damaged, cut short, or not a PyTorch checkpoint: "
            "download or copy it again and compare its size"
        )
    return f"{path} is not a PyTorch checkpoint: name a .pt file written by the training"


def find_model(checkpoint: Checkpoint) -> Inert | nn.Module:
    """The network in a checkpoint: its moving average (`ema`) where there is one, else `model`;
    without what it is wrapped in.

    Raises:
        UserError: the file holds no network, or only its tensors.
    """
    root = checkpoint.root
    candidates = [root.get("ema"), root.get("model")] if isinstance(root, dict) else [root]
    for candidate in candidates:
        # Some keep the number of updates beside it.
        network = candidate[0] if isinstance(candidate, tuple) and candidate else candidate
        if _is_module(network):
            return _unwrapped(network)
    if _holds_tensors(root):
        raise UserError(
            f"{checkpoint.path} holds tensors only (a state dict), not the architecture they "
            "belong to: name the checkpoint that the training wrote"
        )
    raise UserError(
        f"{checkpoint.path} holds no network: name a checkpoint of YOLOv5 or Ultralytics training"
    )


def holds_no_module(checkpoint: Checkpoint) -> bool:
    """Whether there are tensors in a checkpoint and no network."""
    root = checkpoint.root
    values = root.values() if isinstance(root, dict) else [root]
    return _holds_tensors(root) and not any(map(_is_module, values))


_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "AutoShape": "model",
    "autoShape": "model",
    "DetectMultiBackend": "model",
    "AutoBackend": "model",
    "YOLO": "model",
}
"""What holds a network and adds nothing to what it computes, by its class; and where."""


def _unwrapped(module: Any) -> Any:
    for _ in range(DEEPEST):
        # Anything may be wrapped by something of one's own that calls it `module`.
        where = _WRAPPERS.get(class_of(module).rpartition(".")[2], "module")
        inner = attribute(module, where)
        if not _is_module(inner):
            break
        module = inner
    return module


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module) or (isinstance(value, Inert) and "_modules" in value.state)


def _holds_tensors(root: Any, depth: int = 3) -> bool:
    """Whether tensors lie in a mapping, or in those that lie in it."""
    level = [root]
    visited: set[int] = set()
    for _ in range(depth + 1):
        if any(isinstance(value, Tensor) for value in level):
            return True
        # Each once, however often it is named.
        mappings = {id(value): value for value in level if isinstance(value, dict)}
        level = [part for key in mappings.keys() - visited for part in mappings[key].values()]
        visited |= mappings.keys()
    return False


def class_of(module: Any) -> str:
    """Module and class of an object, real or inert, e.g. "models.common.Conv"."""
    if isinstance(module, Inert):
        return module.qualified_name
    return f"{type(module).__module__}.{type(module).__qualname__}"


def children_of(module: Inert | nn.Module) -> dict[str, Any]:
    """The direct submodules by name, in order.

    Raises:
        UserError: what the checkpoint holds in their place is none.
    """
    if isinstance(module, nn.Module):
        return dict(module.named_children())
    modules = _group(module, "_modules")
    for name, child in modules.items():
        if child is not None and not _is_module(child):
            raise UserError(
                f"the checkpoint is damaged: a {shown(module.class_name)} has {brief(child)} for "
                f"its module {brief(name)}"
            )
    return {name: child for name, child in modules.items() if child is not None}


def _group(module: Inert, name: str) -> dict[str, Any]:
    """`_modules`, `_parameters` or `_buffers` of a module."""
    group = module.state.get(name)
    if group is None:
        return {}
    usable = isinstance(group, dict) and len(group) <= MOST_TENSORS
    if not usable or not all(isinstance(key, str) for key in group):
        raise UserError(
            f"the checkpoint is damaged: a {shown(module.class_name)} has {brief(group)} for its "
            f"{name}"
        )
    return group


def modules_of(module: Inert | nn.Module) -> Iterator[tuple[str, Any]]:
    """The module and all below it with qualified names (its own is ""), depth first.

    Raises:
        UserError: a module contains itself, or there are more, or deeper in each other, than any
            network has.
    """
    count = 0

    def walk(name: str, current: Any, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
        nonlocal count
        count += 1
        if id(current) in above:
            raise UserError(f"the checkpoint is damaged: module {shown(name)} contains itself")
        if count > MOST_MODULES or len(above) > DEEPEST:
            raise UserError(
                f"the checkpoint holds a network of more than {MOST_MODULES} modules, or of more "
                f"than {DEEPEST} in each other"
            )
        yield name, current
        for child_name, child in children_of(current).items():
            path = f"{name}.{child_name}" if name else child_name
            yield from walk(path, child, (*above, id(current)))

    yield from walk("", module, ())


def state_dict_of(module: Inert | nn.Module, source: str = "the checkpoint") -> dict[str, Tensor]:
    """The state dict of a network without counters of operations: parameters and persistent buffers
    by qualified name, floating ones as float32.

    Args:
        module: the network.
        source: where it is from, for messages.

    Raises:
        UserError: a tensor cannot be used: see `tensors.sound`.
    """
    tensors: dict[str, Tensor] = {}
    if isinstance(module, nn.Module):
        tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    else:
        for name, inner in modules_of(module):
            transient = inner.state.get("_non_persistent_buffers_set") or ()
            skipped = transient if isinstance(transient, set | frozenset | list) else ()
            buffers = _group(inner, "_buffers").items()
            members = {
                **_group(inner, "_parameters"),
                **{key: value for key, value in buffers if key not in skipped},
            }
            for key, value in members.items():
                full = f"{name}.{key}" if name else key
                if isinstance(value, Tensor):
                    tensors[full] = value.detach()
                elif value is not None:
                    raise UserError(f"{source}: {shown(full)} is {brief(value)}, not a tensor")
            if len(tensors) > MOST_TENSORS:
                raise UserError(f"{source} holds a network of more than {MOST_TENSORS} tensors")
    return sound({n: tensor for n, tensor in tensors.items() if not is_counter(n)}, source)


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a checkpoint that holds a state dict, bare or under the name that trainers
    put it under, or a whole network; floating ones as float32, under the names that the network
    itself gives them.

    Raises:
        UserError: there are none, or one is of no use: see `tensors.sound`.
    """
    root, source = checkpoint.root, str(checkpoint.path)
    candidates: list[Any] = [root]
    if isinstance(root, dict):
        candidates = [root.get(key) for key in ("state_dict", "model", "model_state_dict", "ema")]
        candidates.append(root)
    for candidate in candidates:
        if _is_module(candidate):
            return unprefixed(state_dict_of(candidate, source))
        if not isinstance(candidate, dict):
            continue
        tensors = {str(k): v.detach() for k, v in candidate.items() if isinstance(v, Tensor)}
        if tensors:
            return sound(unprefixed(tensors), source)
    raise UserError(f"{source} holds no weights: name a checkpoint with a state dict")


def attribute(module: Inert | nn.Module, name: str, default: Any = None) -> Any:
    """An attribute of a module, found as `nn.Module` finds it; `default` where there is none."""
    if isinstance(module, nn.Module):
        return getattr(module, name, default)
    if name in module.state:
        return module.state[name]
    for group in ("_parameters", "_buffers", "_modules"):
        members = module.state.get(group)
        if isinstance(members, dict) and name in members:
            return members[name]
    return default

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

from ..errors import UserError
from .restricted_pickle import Inert, restricted_pickle

__all__ = [
    "Checkpoint",
    "Inert",
    "attribute",
    "children_of",
    "class_of",
    "find_model",
    "modules_of",
    "read_checkpoint",
    "sha256_of",
    "state_dict_of",
    "tensors_of",
]

_ZIP_MAGIC = b"PK\x03\x04"


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
    _refuse_torchscript(path, data)
    options: dict[str, Any] = {} if trust else {"pickle_module": restricted_pickle(str(path))}
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
        reason = error.strerror or str(error)
        raise UserError(f"cannot read the checkpoint {path}: {reason}") from error
    if not data:
        raise UserError(f"{path} is empty: download or copy the checkpoint again")
    return data


def _refuse_torchscript(path: Path, data: bytes) -> None:
    # By torch's own zip reader: another one might list a crafted archive differently.
    if not data.startswith(_ZIP_MAGIC):
        return
    try:
        records = torch._C.PyTorchFileReader(io.BytesIO(data)).get_all_records()
    except Exception as error:
        raise UserError(_unreadable(path, data)) from error
    if "constants.pkl" in records:
        raise UserError(
            f"{path} is a TorchScript archive (an exported program), which cannot be quantized: "
            "name the training checkpoint (.pt) it was exported from"
        )


def _unreadable(path: Path, data: bytes) -> str:
    # 0x80 opens every binary pickle, and so the older checkpoint format.
    if data.startswith((_ZIP_MAGIC, b"\x80")):
        return (
            f"{path} is damaged, cut short, or not a PyTorch checkpoint: "
            "download or copy it again and compare its size"
        )
    return f"{path} is not a PyTorch checkpoint: name a .pt file written by the training"


def find_model(checkpoint: Checkpoint) -> Inert | nn.Module:
    """The network in a checkpoint: its moving average (`ema`) where there is one, else `model`.

    Raises:
        UserError: the file holds no network, or only its tensors.
    """
    root = checkpoint.root
    candidates = [root.get("ema"), root.get("model")] if isinstance(root, dict) else [root]
    for candidate in candidates:
        if _is_module(candidate):
            inner = attribute(candidate, "module", None)
            return inner if _is_module(inner) else candidate
    if _holds_tensors(root):
        raise UserError(
            f"{checkpoint.path} holds tensors only (a state dict), not the architecture they "
            "belong to: name the checkpoint that the training wrote"
        )
    raise UserError(
        f"{checkpoint.path} holds no network: name a checkpoint of YOLOv5 or Ultralytics training"
    )


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module) or (isinstance(value, Inert) and "_modules" in value.state)


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict) and depth:
        return any(_holds_tensors(item, depth - 1) for item in value.values())
    return False


def class_of(module: Any) -> str:
    """Module and class of an object, real or inert, e.g. "models.common.Conv"."""
    if isinstance(module, Inert):
        return module.qualified_name
    return f"{type(module).__module__}.{type(module).__qualname__}"


def children_of(module: Inert | nn.Module) -> dict[str, Any]:
    """The direct submodules by name, in order."""
    if isinstance(module, nn.Module):
        return dict(module.named_children())
    modules = module.state.get("_modules") or {}
    return {name: child for name, child in modules.items() if child is not None}


def modules_of(module: Inert | nn.Module) -> Iterator[tuple[str, Any]]:
    """The module and all below it with qualified names (its own is ""), depth first.

    Raises:
        UserError: a module contains itself.
    """

    def walk(name: str, current: Any, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
        if id(current) in above:
            raise UserError(f"the checkpoint is damaged: module {name} contains itself")
        yield name, current
        for child_name, child in children_of(current).items():
            if isinstance(child, (Inert, nn.Module)):
                path = f"{name}.{child_name}" if name else child_name
                yield from walk(path, child, (*above, id(current)))

    yield from walk("", module, ())


def state_dict_of(module: Inert | nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by qualified name; floating ones as float32."""
    tensors: dict[str, Tensor] = {}
    if isinstance(module, nn.Module):
        tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    else:
        for name, inner in modules_of(module):
            transient = inner.state.get("_non_persistent_buffers_set") or ()
            own = {
                **(inner.state.get("_parameters") or {}),
                **{
                    key: value
                    for key, value in (inner.state.get("_buffers") or {}).items()
                    if key not in transient
                },
            }
            for key, value in own.items():
                if isinstance(value, Tensor):
                    tensors[f"{name}.{key}" if name else key] = value.detach()
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a checkpoint that holds a state dict, bare or under the name that trainers
    put it under, or a whole network; floating ones as float32.

    Raises:
        UserError: there are none.
    """
    root = checkpoint.root
    candidates: list[Any] = [root]
    if isinstance(root, dict):
        candidates = [root.get(key) for key in ("state_dict", "model", "model_state_dict", "ema")]
        candidates.append(root)
    for candidate in candidates:
        if _is_module(candidate):
            return state_dict_of(candidate)
        if not isinstance(candidate, dict):
            continue
        tensors = {str(k): v.detach() for k, v in candidate.items() if isinstance(v, Tensor)}
        if tensors:
            # As DistributedDataParallel names them.
            names = [name.removeprefix("module.") for name in tensors]
            values = [t.float() if t.is_floating_point() else t for t in tensors.values()]
            return dict(zip(names, values, strict=True))
    raise UserError(f"{checkpoint.path} holds no weights: name a checkpoint with a state dict")


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

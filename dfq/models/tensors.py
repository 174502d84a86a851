"""The tensors of a network as files hold them: what they are called, and whether they are sound."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, shown
from ..runtime.limits import MOST_WEIGHTS
from ..runtime.plain import ODD, one_line

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Left in modules by thop, which YOLOv5 and Ultralytics count operations with; the last one is
# torch's, beside the averaged weights of `torch.optim.swa_utils`.
_COUNTERS = ("total_ops", "total_params", "n_averaged")


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a `.safetensors` file.

    Raises:
        UserError: it is damaged.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, by name.

    Raises:
        UserError: it is damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


DIGEST = "tensors_sha256"
"""Under which the description in a file of ours holds what `digest_of` gave."""


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of tensors on the CPU: names, types, shapes and bytes; without BatchNorm's
    counters, which files may lack, and nothing is computed with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def with_digest(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A file's description that also tells its tensors from others."""
    return {**description, DIGEST: digest_of(tensors)}


def require_intact(
    tensors: Mapping[str, Tensor], description: Mapping[str, Any], source: str
) -> None:
    """Refuse tensors that are not those a file was written with.

    Args:
        tensors: as they are in the file.
        description: of the file; one that was written before there were digests has none.
        source: of the tensors, for the message.

    Raises:
        UserError: they are others.
    """
    if DIGEST in description and digest_of(tensors) != description[DIGEST]:
        raise UserError(
            f"{source}: damaged or altered, as the sha256 of its tensors is not the one it was "
            "written with; copy the file again"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, struct.error, *ODD) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}): it is damaged; copy the file again"
        ) from error


def is_counter(name: str) -> bool:
    """Whether a tensor of that name counts something and belongs to no network."""
    return name.rpartition(".")[2] in _COUNTERS


def unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the network itself gives them.

    Where all names begin with the same part, it is that of a wrapper (`module.` of
    DistributedDataParallel, `_orig_mod.` of a compiled network, `model.` of a trainer), for a
    detector has a backbone and a head.
    """
    result = {name: tensor for name, tensor in tensors.items() if not is_counter(name)}
    while len(first := {name.partition(".")[0] for name in result}) == 1 and all(
        "." in name for name in result
    ):
        (prefix,) = first
        result = {name.removeprefix(f"{prefix}."): tensor for name, tensor in result.items()}
    return result


def sound(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors, floating ones as float32; whole numbers as they are.

    Args:
        tensors: by qualified name.
        source: of the file, for messages.

    Raises:
        UserError: one is of a type that weights are not kept in without more (float8, say, whose
            scales are elsewhere), holds NaN or an infinity, or is a variance below zero: the
            message names it; or they are more than `limits` allows.
    """
    result = {}
    if sum(tensor.numel() for tensor in tensors.values()) > MOST_WEIGHTS:
        raise UserError(f"{source} holds more than {MOST_WEIGHTS} weights, shared ones included")
    for name, tensor in tensors.items():
        where = f"{source}: the tensor {shown(name)}"
        if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_complex():
            raise UserError(f"{where} is {_kind(tensor)}, not plain numbers")
        if not tensor.is_floating_point():
            result[name] = tensor
            continue
        if tensor.dtype not in _FLOATS:
            raise UserError(
                f"{where} is of {_kind(tensor)}: give the weights as they were trained, in "
                "float32, float16 or bfloat16"
            )
        cast = tensor.float()
        if not torch.isfinite(cast).all():
            non_finite = "NaN" if torch.isnan(cast).any() else "an infinity"
            raise UserError(
                f"{where} holds {non_finite}: the training diverged or the file is damaged; name "
                "an earlier checkpoint"
            )
        if name.rpartition(".")[2] == "running_var" and (cast < 0).any():
            raise UserError(f"{where} holds a variance below zero: the file is damaged")
        result[name] = cast
    return result


def check_kinds(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse whole numbers in the place of weights, and the other way round.

    torch converts one into the other without a word.

    Raises:
        UserError: names the tensor.
    """
    for name, tensor in tensors.items():
        reference = expected.get(name)
        if name.endswith("num_batches_tracked"):
            # Averages of weights average it as well.
            continue
        if reference is not None and reference.is_floating_point() != tensor.is_floating_point():
            raise UserError(
                f"{source}: the tensor {shown(name)} is of {_kind(tensor)}, where the network has "
                f"{_kind(reference)}"
            )


def refuse_pruned(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str
) -> None:
    """Refuse tensors of a network whose channels were cut: its description knows nothing of that,
    and the network cannot be built.

    Raises:
        UserError: names and dimensions are those of the network, and some sides are smaller.
    """
    smaller = []
    for name, tensor in expected.items():
        cut = tensors.get(name)
        if cut is None or cut.ndim != tensor.ndim:
            return
        if cut.shape != tensor.shape:
            if any(ours > theirs for ours, theirs in zip(cut.shape, tensor.shape, strict=True)):
                return
            smaller.append(f"{name} is {tuple(cut.shape)}, not {tuple(tensor.shape)}")
    if smaller:
        raise UserError(
            f"the weights in {source} do not fit its own description: {len(smaller)} are smaller "
            f"({smaller[0]}), as of a pruned network, which cannot be built from that; name the "
            "checkpoint from before pruning, or train one whose description is as narrow"
        )


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f"{tensor.layout} ".replace("torch.", "")
    return f"{layout}{str(tensor.dtype).removeprefix('torch.')}"

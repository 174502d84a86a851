"""A float detector as one `.safetensors` file of ours, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError
from ..runtime.files import reason, write_atomic
from ..runtime.plain import one_line, parse_json
from .base import Model
from .bounded import bounded, most_for
from .checkpoint import sha256_of
from .registry import from_spec
from .tensors import (
    check_kinds,
    read_metadata,
    read_safetensors,
    require_intact,
    sound,
    with_digest,
)

METADATA_KEY = "dfq"

KIND = "dfq quantized detector"
"""What the model and the manifest of a run say that they are."""


def save_detector(detector: Model, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
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
        write_atomic(path, save(tensors, metadata={METADATA_KEY: text}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        cast = tensor.to(dtype)
        tensor = cast if torch.isfinite(cast).all() else tensor.float()
    # A copy: safetensors refuses tensors that share memory.
    return tensor.clone(memory_format=torch.contiguous_format)


def read_detector(path: Path) -> Model:
    """A detector that `save_detector` wrote.

    Raises:
        UserError: it did not, or the file is damaged.
    """
    metadata = read_metadata(path)
    if is_quantized(metadata):
        raise UserError(
            f"{path}: is the quantized model of a run; give the float detector it was made from"
        )
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{path} was not written by dfq (it holds tensors only): give the checkpoint (.pt)"
        )
    try:
        spec = parse_json(metadata[METADATA_KEY], "its description")
        with bounded("its description", most=most_for(path.stat().st_size)):
            detector = from_spec(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    tensors = read_safetensors(path)
    _fill(detector, sound(tensors, str(path)), path)
    require_intact(tensors, spec, str(path))
    detector.fingerprint = sha256_of(path)
    return detector


def is_of_dfq(metadata: dict[str, str]) -> bool:
    """Whether the metadata of a `.safetensors` file are those of one of ours."""
    return is_quantized(metadata) or METADATA_KEY in metadata


def _fill(detector: Model, state: dict[str, Tensor], path: Path) -> None:
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


def is_quantized(metadata: dict[str, str]) -> bool:
    """Whether the metadata of a `.safetensors` file are those of a run's model."""
    return metadata.get("kind") == KIND or quantized_description(metadata) is not None


def quantized_description(metadata: dict[str, str]) -> dict[str, Any] | None:
    """What a run's model says of itself; None where it is no such model, or of format 1."""
    try:
        description = parse_json(metadata.get("dfq", "null"), "its description")
    except UserError:
        return None
    if not isinstance(description, dict) or description.get("kind") != KIND:
        return None
    # Models of format 2 do not say it.
    return {"format": 2, **description}

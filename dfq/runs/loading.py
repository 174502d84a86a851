"""The models that the verbs are given: loaded, and refused where they are of the wrong kind."""

from __future__ import annotations

from pathlib import Path

from ..data.image_set import is_file
from ..errors import UserError
from ..export.opened import open_exported
from ..export.opening import is_exported
from ..models import loading
from ..models.base import AnyModel, Detector, Model, Predicting
from ..models.loading import require_detector
from ..models.storage import is_quantized
from ..models.tensors import read_metadata
from ..quantization.traversal import quantized_layers
from ..runtime.files import user_path
from ..runtime.surroundings import cache_folder
from .folder import is_run, load_quantized, load_run
from .inputs import refuse_set

Measurable = Predicting
"""What can be measured: a model of either task, or an exported file."""


def load_detector(source: str | Path, *, trust: bool = False, device: str = "cpu") -> Detector:
    """Load a detector by any name that `models.load_detector` takes, or the `model.safetensors` of
    a run: then it is quantized and folded.

    Args:
        source: file, published name or description of a network.
        trust: run what is in a checkpoint, for files whose author is trusted.
        device: where to put it, e.g. "cpu" or "cuda:0".

    Raises:
        UserError: nothing by that name, no detector in it, no network, or no such device.

    Example:
        >>> dfq.load_detector("demo").names[:2]
        ['ball', 'ring']
    """
    return require_detector(_load(source, trust=trust, device=device))


def load_model(source: str | Path, *, trust: bool = False, device: str = "cpu") -> Model:
    """Load a detector or a classifier: a float one, or the quantized one of a run folder or of its
    `model.safetensors`.

    Args:
        source: file, published name or description of a network, or a run folder.
        trust, device: as for `load_detector`.

    Raises:
        UserError: nothing by that name, no model in it, no network, or no such device.

    Example:
        >>> dfq.load_model("run").image_size
        160
    """
    refuse_set(source)
    if _is_run(source):
        return load_run(user_path(source), device=device)
    return _load(source, trust=trust, device=device)


def _load(source: str | Path, *, trust: bool, device: str) -> Model:
    path = user_path(source)
    stored = path.suffix.lower() == ".safetensors" and path.is_file()
    if stored and is_quantized(read_metadata(path)):
        model = load_quantized(path)
        model.source = str(source)
        return model.to(device)
    return loading.load_model(source, trust=trust, device=device)


def as_measurable(model: str | Path | Predicting, *, trust: bool, device: str) -> Predicting:
    """What predicts, on a device: as it is given, or as it is named: a float model with weights,
    the quantized one of a run folder, or an exported file."""
    if isinstance(model, Model):
        return model.to(device)
    if not isinstance(model, str | Path):
        return model
    # NETWORK@WEIGHTS names two files and is the name of none.
    if is_exported(model) and ("@" not in str(model) or is_file(user_path(model))):
        return open_exported(user_path(model), trust=trust)
    return require_weights(load_model(model, trust=trust, device=device))


def load_float(source: str | Path | None, *, trust: bool, device: str) -> Model:
    """A float model with weights.

    Raises:
        UserError: none is named, or it is something else.
    """
    if source is None:
        raise UserError(
            "which model? give --model, or `model:` in the recipe; no calibration set in "
            f"{cache_folder()} tells of one"
        )
    refuse_set(source)
    if _is_run(source):
        raise UserError(f"{source}: is a quantized run; give the float detector it was made from")
    return require_float(require_weights(_load(source, trust=trust, device=device)))


def as_float(model: str | Path | Model, *, trust: bool, device: str) -> Model:
    """The float model that is named to compare with, or that is given, on a device.

    Raises:
        UserError: it is none.
    """
    if isinstance(model, Model):
        return require_float(model).to(device)
    return load_float(model, trust=trust, device=device)


def require_float(detector: AnyModel) -> AnyModel:
    """The detector, unless it is quantized already."""
    if any(True for _ in quantized_layers(detector.module)):
        raise UserError(
            f"{detector.source}: is quantized already; give the float detector it was made from"
        )
    return detector


def require_weights(detector: AnyModel) -> AnyModel:
    """The detector, unless its weights are random and nobody said that they are to be."""
    if detector.random_weights:
        raise UserError(
            f"{detector.source}: is a network without weights; give them with --checkpoint FILE "
            f"({detector.source}@FILE), or say --random-weights ({detector.source}@random)"
        )
    return detector


def _is_run(source: str | Path) -> bool:
    try:
        return is_run(user_path(source))
    except OSError:
        # A name that no file can have.
        return False

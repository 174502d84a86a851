"""`dfq cost`: what a detector costs, by what a user names."""

from __future__ import annotations

from pathlib import Path

from ..errors import argument
from ..export.cost import Cost, FileCost, detector_cost, file_cost
from ..export.opening import is_exported
from ..models.base import Model
from ..runs.loading import load_model


def cost(
    model: str | Path | Model, *, image_size: int | None = None, trust: bool = False
) -> Cost | FileCost:
    """What a detector or a run costs, layer by layer; of an exported file, its size.

    Args:
        model: a detector, or what names one, or a run folder, or an exported file.
        image_size: side in pixels; None: the detector's own.
        trust: run what is in the checkpoint.

    Returns:
        A `FileCost` for an exported file, whose layers are its runtime's.

    Raises:
        UserError: for anything the user can mend.

    Example:
        >>> full, low = dfq.cost("demo"), dfq.cost("run")
        >>> full.total.disk_bytes / low.total.disk_bytes
        4.0
    """
    if not isinstance(model, Model):
        if is_exported(model):
            return file_cost(model, image_size)
        model = load_model(model, trust=trust)
    size = model.image_size if image_size is None else image_size
    model.check_size(size, argument("image-size"))
    return detector_cost(model, size)

"""How far the predictions of two networks are apart."""

from __future__ import annotations

import torch

from ..data.pixels import Pixels
from ..models.base import Model
from ..models.divergence import total_divergence


def mean_divergence(student: Model, teacher: Model, data: Pixels) -> float:
    """How far the predictions of two networks are apart, per image: the training's own divergence
    (`total_divergence`) over each distribution of the head. On real images it tells low-bit
    networks apart that AP, on a few hundred images, cannot.

    Args:
        student, teacher: on one device, the teacher is the reference.
        data: all of its images count; its labels do not.
    """
    batches = torch.arange(len(data)).split(16)
    total = total_divergence(student, teacher, (data.load(indices.tolist()) for indices in batches))
    return float(total) / len(data)

"""How far predictions are from those of a reference, by what the head predicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationPair, Model


def _bernoulli_kl(pair: DistillationPair, temperature: float) -> Tensor:
    """Sum of KL(teacher || student) over independent sigmoids, weighted place by place."""
    teacher, student = pair.teacher / temperature, pair.student / temperature
    # Cross entropy less the teacher's entropy: zero where they agree, so that losses compare. Both
    # are softplus(x) - p x; two calls of binary_cross_entropy_with_logits take twice the time.
    divergence = F.softplus(student) - F.softplus(teacher) + teacher.sigmoid() * (teacher - student)
    if pair.weight is not None:
        divergence = divergence * pair.weight
    return divergence.sum() * temperature**2


def _categorical_kl(pair: DistillationPair, temperature: float) -> Tensor:
    """Sum of KL(teacher || student) over softmaxes along `pair.dim`, weighted place by place."""
    teacher = F.log_softmax(pair.teacher / temperature, dim=pair.dim)
    student = F.log_softmax(pair.student / temperature, dim=pair.dim)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=pair.dim, keepdim=True)
    if pair.weight is not None:
        divergence = divergence * pair.weight
    return divergence.sum() * temperature**2


def _value_distance(pair: DistillationPair, temperature: float) -> Tensor:
    distance = (pair.student - pair.teacher).square()
    if pair.weight is not None:
        distance = distance * pair.weight
    return distance.sum()


_DIVERGENCES = {
    "bernoulli": _bernoulli_kl,
    "categorical": _categorical_kl,
    "value": _value_distance,
}


def prediction_divergence(
    pairs: Sequence[DistillationPair], batch: int, *, temperature: float = 1.0
) -> Tensor:
    """KL divergence of student from teacher, nats: summed over the distributions that the head
    predicts (squared distances for plain values), mean over the images.

    Args:
        pairs: from `Model.distillation_pairs`.
        batch: number of images.
        temperature: divides the logits of both; the result is multiplied by its square, so that
            gradients keep their size.

    Returns:
        A scalar, 0 where both agree; differentiable with respect to the student.
    """
    total = torch.stack([_DIVERGENCES[pair.kind](pair, temperature) for pair in pairs]).sum()
    return total / batch


def flattened_divergence(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, temperature: float = 4.0
) -> Tensor:
    """The paper's KL: one softmax over all raw outputs of a level of an image.

    Args:
        student, teacher: from `Model.levels`: `(n, channels, ...)` a level.
        temperature: divides the outputs of both; see `prediction_divergence`.

    Returns:
        A scalar, nats: mean over the images, sum over the levels.
    """
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        log_student = F.log_softmax(ours.flatten(1) / temperature, dim=1)
        log_teacher = F.log_softmax(theirs.flatten(1) / temperature, dim=1)
        kl = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        terms.append(kl * temperature**2)
    return torch.stack(terms).sum()


def summed_divergence(student: Model, student_raw: Any, teacher_raw: Any) -> Tensor:
    """`prediction_divergence` at temperature 1, as a sum over the images: a scalar, nats. It
    measures networks, whatever form of the divergence they were trained on."""
    return prediction_divergence(student.distillation_pairs(student_raw, teacher_raw), 1)


@torch.no_grad()
def total_divergence(student: Model, teacher: Model, batches: Iterable[Tensor]) -> Tensor:
    """`summed_divergence` of two networks on images.

    Args:
        student, teacher: on one device; the teacher is the reference.
        batches: uint8 `(n, 3, h, w)`.

    Returns:
        A scalar on that device.
    """
    total = torch.zeros((), device=student.device)
    for batch in batches:
        images = batch.to(student.device).float() / 255
        total += summed_divergence(student, student.raw(images), teacher.raw(images))
    return total


def divergence_per_image(student: Model, teacher: Model, images: Tensor) -> float:
    """`total_divergence` on uint8 images `(n, 3, h, w)`, 16 at a time, divided by their number."""
    return float(total_divergence(student, teacher, images.split(16))) / len(images)

"""What the student is trained on: predictions, features, labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.base import Detector, DistillationPair, Targets
from ..recipe import Distillation
from ..runtime.precision import computing_in, float32
from .features import absolute_distance


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
    """Family-aware KL: over each distribution the head really has, summed, per image.

    Args:
        pairs: from `Detector.distillation_pairs`.
        batch: number of images.
        temperature: softens both sides; the gradient's size is kept by T^2.
    """
    total = torch.stack([_DIVERGENCES[pair.kind](pair, temperature) for pair in pairs]).sum()
    return total / batch


def flattened_divergence(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, temperature: float = 4.0
) -> Tensor:
    """The paper's KL: one softmax over all raw outputs of a level of an image, levels summed."""
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        log_student = F.log_softmax(ours.flatten(1) / temperature, dim=1)
        log_teacher = F.log_softmax(theirs.flatten(1) / temperature, dim=1)
        kl = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        terms.append(kl * temperature**2)
    return torch.stack(terms).sum()


def feature_moments(features: Mapping[str, Tensor]) -> Tensor:
    """Mean and variance of each layer's features, `(2, layers)`, layers in the mapping's order."""
    pairs = [torch.var_mean(tensor, correction=0) for tensor in features.values()]
    return torch.stack([torch.stack([mean, var]) for var, mean in pairs], dim=1)


def feature_distance(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    variances: Tensor | None = None,
) -> Tensor:
    """Mean over the layers of ||S - T||^2 / ||T - mean T||^2: relative, so no layer's scale counts.

    Args:
        student, teacher: layer name -> features of one shape.
        variances: of the teacher's features, `(layers,)` in the order of `teacher`, where they are
            taken over more images than these; None: over these.
    """
    if variances is None:
        variances = feature_moments(teacher)[1]
    terms = [
        (student[name] - target).square().mean() / (variance + 1e-6)
        for (name, target), variance in zip(teacher.items(), variances.unbind(), strict=True)
    ]
    return torch.stack(terms).mean()


class FeatureTaps:
    """Keeps the outputs of named modules of the last forward pass.

    Args:
        module: the network.
        names: qualified module names.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.features: dict[str, Tensor] = {}
        self._handles = []
        for name in names:

            def keep(_m: nn.Module, _i: object, output: Tensor, name: str = name) -> None:
                self.features[name] = output

            self._handles.append(module.get_submodule(name).register_forward_hook(keep))

    def take(self) -> dict[str, Tensor]:
        """The features, handed over: nothing is kept alive past the step."""
        features, self.features = self.features, {}
        return features

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def distillation_terms(
    student: Detector,
    student_raw: Any,
    teacher_raw: Any,
    *,
    batch: int,
    form: str,
    temperature: float,
) -> Tensor:
    """The prediction term in the form asked for: `family` or `flattened`."""
    if form == "flattened":
        return flattened_divergence(
            student.levels(student_raw), student.levels(teacher_raw), temperature=temperature
        )
    pairs = student.distillation_pairs(student_raw, teacher_raw)
    return prediction_divergence(pairs, batch, temperature=temperature)


def training_terms(
    student: Detector,
    teacher: Detector,
    images: Tensor,
    targets: Targets,
    settings: Distillation,
    ours: FeatureTaps,
    theirs: FeatureTaps,
    variances: Callable[[Mapping[str, Tensor]], Tensor | None] | None = None,
    precision: str = "float32",
) -> dict[str, Tensor]:
    """The terms that training minimises the sum of, each weighted; means over the images.

    Args:
        student, teacher: the low-bit network, and the float one, which gets no gradient.
        images: `(n, 3, h, w)`, RGB in [0, 1].
        targets: their labels; looked at only where the task term has a weight.
        settings: the `distillation` section of a recipe.
        ours, theirs: taps on the distilled layers of student and teacher.
        variances: gives those of the teacher's features over all of the batch, `(layers,)`, where
            these images are a part of it; None, or giving None: over these images.
        precision: what convolutions compute in, "float32" or "bfloat16"; the terms are summed in
            float32.

    Returns:
        "kl", "feature" and "task", scalars, those with a weight.
    """
    weights = settings.weights
    with torch.no_grad(), computing_in(precision, images.device):
        teacher_raw = float32(teacher.raw(images))
    features: dict[str, Tensor] = float32(theirs.take())
    spread = None if variances is None else variances(features)
    with computing_in(precision, images.device):
        student_raw = float32(student.raw(images))
    terms = {}
    if weights.kl > 0:
        terms["kl"] = weights.kl * distillation_terms(
            student,
            student_raw,
            teacher_raw,
            batch=len(images),
            form=settings.kl_form,
            temperature=settings.temperature,
        )
    if weights.feature > 0:
        got: dict[str, Tensor] = float32(ours.take())
        if settings.feature_form == "absolute":
            distance = absolute_distance(got, features, student.module)
        else:
            distance = feature_distance(got, features, spread)
        terms["feature"] = weights.feature * distance
    if weights.task > 0:
        shape = (images.shape[2], images.shape[3])
        task = student.task_loss(student_raw, targets, shape)
        terms["task"] = weights.task * torch.stack(list(task.values())).sum()
    return terms


def summed_divergence(student: Detector, student_raw: Any, teacher_raw: Any) -> Tensor:
    """Sum over the images of how far the predictions are apart, whatever form is trained on: the
    family-aware divergence at temperature 1."""
    return prediction_divergence(student.distillation_pairs(student_raw, teacher_raw), 1)


@torch.no_grad()
def total_divergence(student: Detector, teacher: Detector, batches: Iterable[Tensor]) -> Tensor:
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

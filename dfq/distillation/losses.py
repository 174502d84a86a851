"""What the student is trained on: predictions, features, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..detectors.base import Detector, DistillationPair


def _bernoulli_kl(pair: DistillationPair, temperature: float) -> Tensor:
    """Sum of KL(teacher || student) over independent sigmoids, weighted place by place."""
    teacher, student = pair.teacher / temperature, pair.student / temperature
    target = teacher.sigmoid()
    # Cross entropy less the teacher's entropy: zero where they agree, so that losses compare.
    entropy = F.binary_cross_entropy_with_logits(teacher, target, reduction="none")
    cross = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    divergence = cross - entropy
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

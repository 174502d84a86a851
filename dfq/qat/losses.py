"""What the student is trained on: predictions, features, labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.base import Model, Targets
from ..models.divergence import flattened_divergence, prediction_divergence
from ..runtime.precision import computing_in, float32
from .features import absolute_distance
from .settings import Distillation


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


class FeatureHooks:
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
        """The outputs by module, `(n, c, h, w)` or `(n, tokens, c)` each; they are not kept here
        any longer."""
        features, self.features = self.features, {}
        return features

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def distillation_terms(
    student: Model,
    student_raw: Any,
    teacher_raw: Any,
    *,
    batch: int,
    form: str,
    temperature: float,
) -> Tensor:
    """The distillation loss on predictions: a scalar, mean over the images.

    Args:
        student, teacher_raw, student_raw: the low-bit network, and what `raw` of both networks
            returned for one batch.
        batch: number of images.
        form: "family" (`prediction_divergence`) or "flattened" (`flattened_divergence`).
        temperature: of either.
    """
    if form == "flattened":
        return flattened_divergence(
            student.levels(student_raw), student.levels(teacher_raw), temperature=temperature
        )
    pairs = student.distillation_pairs(student_raw, teacher_raw)
    return prediction_divergence(pairs, batch, temperature=temperature)


def training_terms(
    student: Model,
    teacher: Model,
    images: Tensor,
    targets: Targets,
    settings: Distillation,
    ours: FeatureHooks,
    theirs: FeatureHooks,
    variances: Callable[[Mapping[str, Tensor]], Tensor | None] | None = None,
    precision: str = "float32",
) -> dict[str, Tensor]:
    """The terms that training minimises the sum of, each weighted; means over the images.

    Args:
        student, teacher: the low-bit network, and the float one, which gets no gradient.
        images: `(n, 3, h, w)`, RGB in [0, 1].
        targets: their labels; looked at only where the task term has a weight.
        settings: the `distillation` section of a recipe.
        ours, theirs: feature_hooks on the distilled layers of student and teacher.
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

"""Losses against PyTorch's distributions and against sums written out."""

from __future__ import annotations

import copy
import math
from typing import Literal

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from dfq.graph.fold_batchnorm import FoldedBatchNorm, fold
from dfq.models.base import Detector, DistillationPair
from dfq.models.divergence import flattened_divergence, prediction_divergence
from dfq.qat.features import absolute_distance, distilled_layers
from dfq.qat.losses import FeatureHooks, distillation_terms, feature_distance
from dfq.qat.settings import Distillation
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.traversal import float_mode

Kind = Literal["bernoulli", "categorical", "value"]


def pair(kind: Kind, weight: Tensor | None = None, dim: int = -1) -> DistillationPair:
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(4, 5, 6, generator=generator)
    teacher = 3 * torch.randn(4, 5, 6, generator=generator)
    return DistillationPair("x", student, teacher, kind, dim=dim, weight=weight)


@pytest.mark.parametrize("kind", ["bernoulli", "categorical", "value"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_zero_where_they_agree_positive_elsewhere(kind: Kind, temperature: float) -> None:
    apart = pair(kind)
    # Far out, where a sigmoid is 0 or 1 in single precision.
    logits = torch.cat([apart.student, torch.tensor([-200.0, 200.0, 0.0]).repeat(4, 5, 2)], dim=2)
    student = logits.clone().requires_grad_()
    same = DistillationPair("x", student, logits, kind)
    loss = prediction_divergence([same], 4, temperature=temperature)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-5
    assert prediction_divergence([apart], 4, temperature=temperature) > 0.1


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_bernoulli_is_the_divergence_of_the_distributions(temperature: float) -> None:
    x = pair("bernoulli")
    want = kl_divergence(
        Bernoulli(logits=x.teacher / temperature), Bernoulli(logits=x.student / temperature)
    ).sum()
    got = prediction_divergence([x], 4, temperature=temperature)
    torch.testing.assert_close(got, want * temperature**2 / 4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dim", [-1, 1])
def test_categorical_is_the_divergence_of_the_distributions(temperature: float, dim: int) -> None:
    x = pair("categorical", dim=dim)
    teacher, student = (t.movedim(dim, -1) / temperature for t in (x.teacher, x.student))
    want = kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).sum()
    got = prediction_divergence([x], 4, temperature=temperature)
    torch.testing.assert_close(got, want * temperature**2 / 4)


def test_values_by_hand() -> None:
    student, teacher = (
        torch.tensor([[1.0, 2.0], [3.0, -1.0]]),
        torch.tensor([[0.0, 2.0], [1.0, 1.0]]),
    )
    weight = torch.tensor([[1.0], [0.5]])
    plain = DistillationPair("x", student, teacher, "value")
    weighted = DistillationPair("x", student, teacher, "value", weight=weight)
    assert float(prediction_divergence([plain], 2)) == (1 + 0 + 4 + 4) / 2
    # Values are no distribution: a temperature has nothing to soften.
    assert float(prediction_divergence([plain], 2, temperature=7.0)) == (1 + 0 + 4 + 4) / 2
    assert float(prediction_divergence([weighted], 2)) == (1 + 0 + 2 + 2) / 2


@pytest.mark.parametrize(("kind", "shape"), [("bernoulli", (4, 5, 1)), ("categorical", (4, 5, 1))])
def test_weights_count_place_by_place(kind: Kind, shape: tuple[int, ...]) -> None:
    weight = torch.rand(*shape, generator=torch.Generator().manual_seed(1))
    x = pair(kind, weight)
    by_place = 0.0
    for i in range(4):
        for j in range(5):
            one = DistillationPair("x", x.student[i, j], x.teacher[i, j], kind)
            by_place += float(weight[i, j]) * float(prediction_divergence([one], 1))
    assert float(prediction_divergence([x], 4)) == pytest.approx(by_place / 4, rel=1e-4)
    whole = DistillationPair("x", x.student, x.teacher, kind, weight=torch.zeros(*shape))
    assert float(prediction_divergence([whole], 4)) == 0


def test_pairs_are_summed_and_divided_by_the_images() -> None:
    kinds: list[Kind] = ["bernoulli", "categorical", "value"]
    pairs = [pair(kind) for kind in kinds]
    alone = sum(float(prediction_divergence([x], 1)) for x in pairs)
    assert float(prediction_divergence(pairs, 4)) == pytest.approx(alone / 4, rel=1e-5)


def test_flattened_by_hand() -> None:
    """Two levels, two images; sum over levels, mean over images, T^2 sum p_t log(p_t / p_s)."""
    generator = torch.Generator().manual_seed(2)
    student = [torch.randn(2, 3, 2, 2, generator=generator), torch.randn(2, 5, generator=generator)]
    teacher = [torch.randn(2, 3, 2, 2, generator=generator), torch.randn(2, 5, generator=generator)]
    temperature, want = 4.0, 0.0

    def softmax(values: list[float]) -> list[float]:
        powers = [math.exp(value / temperature) for value in values]
        return [power / sum(powers) for power in powers]

    for ours, theirs in zip(student, teacher, strict=True):
        for image in range(2):
            p = softmax(theirs[image].flatten().tolist())
            q = softmax(ours[image].flatten().tolist())
            divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            want += temperature**2 * divergence / 2
    got = flattened_divergence(student, teacher, temperature=temperature)
    assert float(got) == pytest.approx(want, rel=1e-4)
    assert float(flattened_divergence(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_feature_distance_by_hand_and_whatever_the_scale() -> None:
    teacher = {"a": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([[0.0, 4.0]])}
    student = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[2.0, 4.0]])}
    # Mean squared distance over variance: 0.5 / 1 and 2 / 4.
    want = (0.5 / 1 + 2 / 4) / 2
    assert float(feature_distance(student, teacher)) == pytest.approx(want, rel=1e-4)
    for scale in (0.1, 1000.0):
        scaled = [{"a": x["a"] * scale, "b": x["b"]} for x in (student, teacher)]
        assert float(feature_distance(*scaled)) == pytest.approx(want, rel=1e-3)
    assert float(feature_distance(teacher, teacher)) == 0


def test_feature_distance_of_a_constant_layer_is_finite() -> None:
    constant = {"a": torch.full((2, 3), 0.5)}
    assert torch.isfinite(feature_distance({"a": torch.full((2, 3), 0.6)}, constant))


def test_features_do_not_depend_on_the_order_of_the_names() -> None:
    teacher = {"a": torch.randn(3, 4), "b": torch.randn(3, 4)}
    student = {"b": teacher["b"].clone(), "a": teacher["a"].clone()}
    assert float(feature_distance(student, teacher)) == 0


def test_taps_hand_over_and_close() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU()), nn.Linear(3, 1))
    feature_hooks = FeatureHooks(net, ["0", "1.0"])
    x = torch.randn(4, 2)
    net(x)
    features = feature_hooks.take()
    assert list(features) == ["0", "1.0"]
    assert torch.equal(features["0"], net[0](x))
    assert torch.equal(features["1.0"], net[0](x).relu())
    feature_hooks.take()
    assert feature_hooks.take() == {}
    feature_hooks.close()
    net(x)
    assert feature_hooks.take() == {}


@pytest.mark.parametrize("form", ["family", "flattened"])
def test_terms_of_a_detector(form: str) -> None:
    detector, other, images = tiny_detector(), tiny_detector(1), blobs(3)
    teacher = detector.raw(images)

    def terms(raw: list[Tensor], batch: int, chosen: slice = slice(None)) -> float:
        theirs = [level[chosen] for level in teacher]
        return float(
            distillation_terms(detector, raw, theirs, batch=batch, form=form, temperature=1.0)
        )

    assert terms(teacher, 3) == pytest.approx(0, abs=1e-5)
    student = other.raw(images)
    each = [terms([level[i : i + 1] for level in student], 1, slice(i, i + 1)) for i in range(3)]
    assert terms(student, 3) == pytest.approx(sum(each) / 3, rel=1e-4)
    assert min(each) > 0.01


@pytest.mark.parametrize("quantizers", [False, True])
def test_the_absolute_form_is_the_mean_over_all_convolutions_and_batchnorms(
    quantizers: bool,
) -> None:
    """The paper's eq. 8 on networks whose BatchNorm is not folded, in double precision."""
    plain, other, images = tiny_detector(), tiny_detector(), blobs(3)
    torch.manual_seed(1)
    for layer in other.module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.add_(0.02 * torch.randn_like(layer.weight))

    def outputs(detector: Detector) -> list[Tensor]:
        module, found = copy.deepcopy(detector.module).double(), []
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                layer.register_forward_hook(lambda _m, _i, output: found.append(output))
        with torch.no_grad():
            module(images.double())
        return found

    pairs = list(zip(outputs(other), outputs(plain), strict=True))
    assert len(pairs) == 18 + 16  # two convolutions give the predictions, without BatchNorm
    want = sum(float((a - b).square().mean()) for a, b in pairs) / len(pairs)
    teacher, student = fold(plain), fold(other)
    if quantizers:
        insert_quantizers(student, Policy())
    names = distilled_layers(student, Distillation(feature_form="absolute"))
    assert len(names) == len(pairs)
    feature_hooks = [FeatureHooks(detector.module, names) for detector in (student, teacher)]
    with torch.no_grad(), float_mode(student.module):
        student.raw(images)
        teacher.raw(images)
    ours, theirs = (tap.take() for tap in feature_hooks)
    assert float(absolute_distance(ours, theirs, student.module)) == pytest.approx(want, rel=1e-4)


def test_channels_that_batchnorm_switches_off_do_not_count_before_it() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    net = nn.Sequential(FoldedBatchNorm(zero, one, torch.tensor([0.5, 0.0]), zero, 1e-5))
    ours, theirs = {"0": torch.ones(1, 2, 1, 1)}, {"0": torch.zeros(1, 2, 1, 1)}
    assert float(absolute_distance(ours, theirs, net)) == pytest.approx((2**2 + 0) / 2)

"""Objectives of block reconstruction in float64, against their equations written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor

from dfq.models.base import DistillationPair, Targets
from dfq.ptq.objectives import METHODS, Step
from dfq.ptq.objectives.block_error import block_error
from dfq.ptq.objectives.bottom_elimination import BOTTOM, bottom_elimination
from dfq.ptq.objectives.fisher import fisher_error
from dfq.ptq.objectives.mixed_granularity import mixed_granularity
from dfq.ptq.objectives.prediction_difference import prediction_difference, predictions_apart
from dfq.ptq.objectives.similarity import (
    batch_similarity,
    similarity_distance,
    similarity_preserving,
)
from dfq.ptq.objectives.task import task_guided


class Logits:
    """A family whose predictions are logits of one softmax an image."""

    def distillation_pairs(self, ours: Tensor, theirs: Tensor) -> list[DistillationPair]:
        return [DistillationPair("class", ours, theirs, "categorical", dim=1)]

    def task_loss(self, raw: Tensor, targets: Targets, shape: tuple[int, int]) -> dict[str, Any]:
        labels = targets.data[:, 1].long()
        return {"cross entropy": torch.nn.functional.cross_entropy(raw, labels)}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def never() -> Any:
    raise AssertionError("not to be asked for")


def step(*shape: int, **changes: Any) -> Step:
    made = Step(
        outputs=[drawn(*shape, seed=0)],
        float_outputs=[drawn(*shape, seed=1)],
        unit=[1.0],
        images=shape[0],
        model=Logits(),  # type: ignore[arg-type]
        predictions=never,
        float_predictions=never,
        layers=never,
        fisher=never,
        targets=never,
        image_shape=(8, 8),
    )
    return replace(made, **changes)


def error_by_hand(ours: Tensor, theirs: Tensor) -> float:
    """Of maps `(n, c, h, w)`: squares summed over channels, averaged over images and places."""
    n, c, h, w = ours.shape
    total = 0.0
    for i in range(n):
        for y in range(h):
            for x in range(w):
                total += sum(float(ours[i, k, y, x] - theirs[i, k, y, x]) ** 2 for k in range(c))
    return total / (n * h * w)


def kl_by_hand(ours: Tensor, theirs: Tensor, temperature: float = 1.0) -> float:
    """KL(theirs || ours) of softmaxes, averaged over the rows."""
    total = 0.0
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
        p = [math.exp(v / temperature) for v in b]
        q = [math.exp(v / temperature) for v in a]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    return total / len(ours)


def test_block_error_is_summed_over_channels_and_averaged_over_the_rest() -> None:
    given = step(2, 3, 4, 5)
    expected = error_by_hand(given.outputs[0], given.float_outputs[0])
    assert float(block_error(given)) == pytest.approx(expected, rel=1e-12)
    assert float(block_error(replace(given, unit=[4.0]))) == pytest.approx(expected / 4, rel=1e-12)
    # Of tokens the channels come last.
    tokens = step(2, 7, 3)
    square = (tokens.outputs[0] - tokens.float_outputs[0]) ** 2
    assert float(block_error(tokens)) == pytest.approx(float(square.sum() / 14), rel=1e-12)


def test_fisher_error_weights_each_square() -> None:
    weight = drawn(2, 3, 4, 5, seed=2).square()
    given = step(2, 3, 4, 5, fisher=lambda: [weight])
    scaled = (given.outputs[0] * weight.sqrt(), given.float_outputs[0] * weight.sqrt())
    assert float(fisher_error(given)) == pytest.approx(error_by_hand(*scaled), rel=1e-12)


def test_prediction_difference_is_the_codes_loss() -> None:
    ours, theirs = 3 * drawn(2, 6, seed=3), 3 * drawn(2, 6, seed=4)
    given = step(2, 3, 4, 5, predictions=lambda: ours, float_predictions=lambda: theirs)
    expected = error_by_hand(given.outputs[0], given.float_outputs[0])
    expected += kl_by_hand(ours, theirs, 4.0) / 0.1
    assert float(prediction_difference(given)) == pytest.approx(expected, rel=1e-9)


def gram_by_hand(rows: list[list[float]]) -> list[list[float]]:
    product = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    lengths = [math.sqrt(sum(v * v for v in row)) for row in product]
    return [[v / n for v in row] for row, n in zip(product, lengths, strict=True)]


def apart_by_hand(a: list[list[float]], b: list[list[float]]) -> float:
    squares = [(x - y) ** 2 for r, s in zip(a, b, strict=True) for x, y in zip(r, s, strict=True)]
    return sum(squares) / len(squares)


def test_similarities_are_normalised_gram_matrices_of_channels_and_places() -> None:
    ours, theirs = drawn(2, 3, 2, 4, seed=5), drawn(2, 3, 2, 4, seed=6)
    by_channel, by_place = 0.0, 0.0
    for a, b in zip(ours.flatten(2), theirs.flatten(2), strict=True):
        channels = [gram_by_hand(one.tolist()) for one in (a, b)]
        places = [gram_by_hand(one.T.tolist()) for one in (a, b)]
        by_channel += apart_by_hand(*channels) / 2
        by_place += apart_by_hand(*places) / 2
    found = similarity_distance(ours, theirs)
    assert float(found) == pytest.approx(by_channel + by_place, rel=1e-9)
    images = [gram_by_hand(one.flatten(1).tolist()) for one in (ours, theirs)]
    given = torch.tensor(images[0], dtype=torch.float64)
    torch.testing.assert_close(batch_similarity(ours), given)
    logits = drawn(2, 6, seed=7), drawn(2, 6, seed=8)
    whole = step(2, 3, 2, 4, predictions=lambda: logits[0], float_predictions=lambda: logits[1])
    whole = replace(whole, outputs=[ours], float_outputs=[theirs])
    expected = kl_by_hand(*logits) + 1000 * (by_channel + by_place)
    assert float(similarity_preserving(whole)) == pytest.approx(expected, rel=1e-9)


def test_mixed_granularity_adds_predictions_and_distributions_of_layers() -> None:
    logits = drawn(2, 6, seed=9), drawn(2, 6, seed=10)
    layers = [(drawn(3, 5, seed=11), drawn(3, 5, seed=12)), (drawn(2, 4, seed=13),) * 2]
    given = step(
        2, 3, 2, 4,
        predictions=lambda: logits[0], float_predictions=lambda: logits[1], layers=lambda: layers,
    )  # fmt: skip
    spread = float(layers[0][1].std()) + 1e-6
    local = kl_by_hand(layers[0][0] / spread, layers[0][1] / spread)
    expected = error_by_hand(given.outputs[0], given.float_outputs[0])
    expected += kl_by_hand(*logits) + local / 2
    assert float(mixed_granularity(given)) == pytest.approx(expected, rel=1e-9)


def test_the_task_weighs_against_the_float_networks_own_loss() -> None:
    logits = drawn(2, 6, seed=14), drawn(2, 6, seed=15)
    labels = Targets(torch.tensor([[0.0, 4, 0.5, 0.5, 1, 1], [1, 2, 0.5, 0.5, 1, 1]]))
    given = step(
        2, 3, 2, 4,
        predictions=lambda: logits[0], float_predictions=lambda: logits[1], targets=lambda: labels,
    )  # fmt: skip
    ours, theirs = (
        sum(math.log(sum(map(math.exp, row))) - row[k] for row, k in zip(x, (4, 2), strict=True))
        for x in (one.tolist() for one in logits)
    )
    expected = error_by_hand(given.outputs[0], given.float_outputs[0]) + ours / theirs
    # Losses are summed in float32, as families give them.
    assert float(task_guided(given)) == pytest.approx(expected, rel=1e-5)


def test_a_detectors_prediction_is_its_classes_and_boxes() -> None:
    detector = tiny_detector()
    raw = detector.raw(blobs(2))
    moved = [level + 0.1 for level in raw]
    given = step(
        2, 3, 2, 4, model=detector, predictions=lambda: moved, float_predictions=lambda: raw
    )
    same = replace(given, predictions=lambda: raw)
    assert float(predictions_apart(same, 4.0)) == pytest.approx(0, abs=1e-6)
    assert float(predictions_apart(given, 4.0)) > 0.01


def test_every_method_has_an_objective_that_falls_to_nothing_where_all_agrees() -> None:
    logits = drawn(2, 6, seed=16)
    labels = Targets(torch.tensor([[0.0, 4, 0.5, 0.5, 1, 1], [1, 2, 0.5, 0.5, 1, 1]]))
    same = drawn(2, 3, 4, 5, seed=17)
    given = step(
        2, 3, 4, 5,
        predictions=lambda: logits, float_predictions=lambda: logits, targets=lambda: labels,
        layers=lambda: [(same, same)], fisher=lambda: [torch.ones(1)],
    )  # fmt: skip
    given = replace(given, outputs=[same], float_outputs=[same])
    for name, method in METHODS.items():
        # The task's loss is that of the float network, and not nothing.
        expected = 1.0 if method.labels else 0.0
        assert float(method.objective(given)) == pytest.approx(expected, abs=1e-6), name


def test_apq_leaves_the_small_errors_of_each_image_out() -> None:
    ours, theirs = drawn(2, 3, 2, 2, seed=0), drawn(2, 3, 2, 2, seed=1)
    # The second image's errors are all smaller than the first one's: half of them count as well.
    theirs[1] = ours[1] + 1e-3 * theirs[1]
    weight = drawn(1, 3, 1, 1, seed=2).abs()
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        away = [
            (abs(float(a[k, y, x] - b[k, y, x])), float(weight[0, k, 0, 0]))
            for k in range(3)
            for y in range(2)
            for x in range(2)
        ]
        away.sort()
        total += sum(w * size**2 for size, w in away[int(BOTTOM * len(away)) :])
    # Summed over channels, averaged over images and places.
    wanted = total / (2 * 2 * 2)
    made = step(2, 3, 2, 2, outputs=[ours], float_outputs=[theirs], fisher=lambda: [weight])
    assert float(bottom_elimination(made)) == pytest.approx(wanted, rel=1e-12)
    same = step(2, 3, 2, 2, outputs=[ours], float_outputs=[ours.clone()], fisher=lambda: [weight])
    assert float(bottom_elimination(same)) == 0

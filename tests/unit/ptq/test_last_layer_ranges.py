"""Ranges of what the last layers read: where the predictions stay closest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.toys import Toy, images
from torch import Tensor, nn

from dfq.graph.execution import hooks
from dfq.models.base import Detector, DistillationPair
from dfq.ptq.grid_walk import GridWalk
from dfq.ptq.last_layer_ranges import (
    CLIP_RATIOS,
    SLACK,
    clipped_grids,
    last_layer_inputs,
    search_last_inputs,
)
from dfq.quantization.calibration import calibrate, run_observers
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.margins import span
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.traversal import activation_quantizers

LAST = "4"


class Scores(Toy):
    """A toy whose every place holds two scores."""

    def distillation_pairs(self, student_raw: Tensor, teacher_raw: Tensor) -> Any:
        return [DistillationPair("class", student_raw, teacher_raw, "bernoulli")]


def network(heard: float) -> Detector:
    """One channel that the last layer reads is rare and large; how loudly it is heard."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1), nn.SiLU()),
            nn.Conv2d(6, 2, 1),
        )
    with torch.no_grad():
        layers[2].weight[0] *= -60
        layers[4].weight[:, 0] = 0.05 * heard
        layers[4].weight[:, 1:] *= 4
    return Scores(layers, last=(LAST,))


def started(teacher: Detector, activations: str = "asymmetric", bits: int = 8) -> Detector:
    student = insert_quantizers(teacher.clone(), Policy(8, bits, "same", activations=activations))
    calibrate(student, [pixels() / 255.0])
    return student


def pixels(seed: int = 0) -> Tensor:
    return (images(8, seed=seed) * 255).byte()


def ends(student: Detector) -> float:
    quantizer = student.module.get_submodule(LAST).input_quantizer
    return float(quantizer.scale) * float(quantizer.bounds[1] - quantizer.zero_point)


@pytest.mark.parametrize("activations", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("heard", [0.0, 1.0])
def test_it_chooses_as_brute_force_in_double_precision(activations: str, heard: float) -> None:
    teacher, seen = network(heard), pixels()
    student = started(teacher, activations)
    values = run_observers(student, [seen / 255.0])[LAST]
    quantizer = student.module.get_submodule(LAST).input_quantizer
    tried = [
        (float(step.double()), round(float(zero)))
        for step, zero in clipped_grids(quantizer, values)
    ]
    search_last_inputs(student, teacher, seen)
    exact, double = teacher.clone().module.double(), seen.double() / 255
    wanted = exact(double).sigmoid()
    low, high = quantizer.bounds

    def divergence(scale: float, zero: int) -> float:
        def rounded(_m: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (((inputs[0] / scale).round() + zero).clamp(low, high).sub(zero) * scale,)

        with hooks([exact.get_submodule(LAST).register_forward_pre_hook(rounded)]):
            scores = exact(double).sigmoid()
        kl = wanted * (wanted / scores).log() + (1 - wanted) * ((1 - wanted) / (1 - scores)).log()
        return float(kl.sum())

    distances = [divergence(*grid) for grid in tried]
    allowed = [
        scale
        for (scale, _), distance in zip(tried, distances, strict=True)
        if distance <= SLACK * min(distances)
    ]
    assert float(quantizer.scale) == pytest.approx(min(allowed), rel=1e-5)


def test_large_values_are_clipped_that_no_score_hears_and_kept_that_scores_are_made_of() -> None:
    """By values alone both are the same."""
    reached = {}
    for heard in (0.0, 8.0):
        teacher = network(heard)
        student = started(teacher)
        calibrated = ends(student)
        search_last_inputs(student, teacher, pixels())
        reached[heard] = ends(student) / calibrated
    assert reached[0.0] < 0.3
    assert reached[8.0] > 0.7


@pytest.mark.parametrize("distance", [0.0, -1e-9, float("nan")])
def test_the_present_grid_stays_where_no_distance_tells(
    distance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = network(1.0)
    student = started(teacher)
    before = ends(student)
    monkeypatch.setattr(GridWalk, "distance", lambda _self: distance)
    search_last_inputs(student, teacher, pixels())
    assert ends(student) == before


def test_scores_of_other_images_are_closer_for_it() -> None:
    teacher, other = network(0.0), pixels(seed=9) / 255.0
    student = started(teacher)
    expected = teacher.raw(other)
    before = (student.raw(other) - expected).abs().mean()
    search_last_inputs(student, teacher, pixels())
    assert (student.raw(other) - expected).abs().mean() < 0.7 * before


@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_else_moves(bits: int) -> None:
    teacher = network(0.0)
    student = started(teacher, bits=bits)
    before = {name: float(q.scale) for name, q in activation_quantizers(student.module)}
    assert set(last_layer_inputs(student, images(1))) == ({LAST} if bits == 8 else set())
    search_last_inputs(student, teacher, pixels())
    after = {name: float(q.scale) for name, q in activation_quantizers(student.module)}
    assert {name for name in after if after[name] != before[name]} == set(
        last_layer_inputs(student, images(1))
    )


def test_grids_before_the_activation_function_move_along() -> None:
    teacher = network(0.0)
    policy = Policy(8, 8, "same", activations="asymmetric", placement="qdq", runtime="onnxruntime")
    student = insert_quantizers(teacher.clone(), policy)
    calibrate(student, [pixels() / 255.0])
    assert set(last_layer_inputs(student, images(1))) >= {"2.output_quantizer"}
    quantizer = student.module.get_submodule("2.output_quantizer")
    assert isinstance(quantizer, Quantizer)
    low, high = map(float, span(quantizer))
    search_last_inputs(student, teacher, pixels())
    least, most = map(float, span(quantizer))
    assert most < 0.5 * high
    # SiLU lets some of it through below zero.
    assert least == pytest.approx(low, abs=0.1)


def test_the_first_grid_spans_all_and_the_others_less_and_less() -> None:
    student = started(network(1.0))
    quantizer = student.module.get_submodule(LAST).input_quantizer
    values = torch.tensor([-0.25, 0.0, 3.0, 8.0])
    grids = clipped_grids(quantizer, values)[1:]
    ends = [float(step) * (255 - float(zero)) for step, zero in grids]
    assert ends[0] == pytest.approx(8.0, rel=0.01)
    assert ends == pytest.approx([8.0 * ratio for ratio in CLIP_RATIOS], rel=0.02)

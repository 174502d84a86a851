"""The phases of a quantization, and what their length goes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_detector import SIDE, tiny_detector

from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Model
from dfq.ptq.rates import Stopwatch
from dfq.recipe import load_recipe
from dfq.runs.phases import quantization_phases


class Passes:
    """A clock that a pass of a network moves by a second an image."""

    def __init__(self, model: Model) -> None:
        self.now = 0.0
        plain = type(model).raw

        def raw(network: Any, images: torch.Tensor) -> Any:
            self.now += len(images)
            return plain(network, images)

        self.raw = raw

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def teacher() -> Model:
    return fold(tiny_detector())


def phases(teacher: Model, *overrides: str, **options: Any) -> dict[str, list[float]]:
    """By name; of a name that comes several times, all units in a row."""
    sizes = {"trained": 64, "calibrated": 64, **options}
    clock = Passes(teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(teacher), "raw", clock.raw)
        watch = Stopwatch(teacher.device, clock)
        recipe = load_recipe("w8a8", overrides)
        made = quantization_phases(teacher, recipe, SIDE, watch=watch, **sizes)
    units: dict[str, list[float]] = {}
    for name, seconds in made:
        units.setdefault(name, []).extend(seconds or [])
    return units


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["method=qat"], ["calibration", "rounding", "training"]),
        (["method=ptq"], ["calibration", "rounding"]),
        (
            ["method=ptq", "quantization.activation_bits=6"],
            ["calibration", "ranges", "rounding"],
        ),
        (
            ["method=ptq", "quantization.reconstruction=best"],
            ["calibration", "rounding", "reconstruction"],
        ),
        (
            ["method=ptq", "quantization.mixed.budget=w4a8"],
            ["sensitivity", "calibration", "rounding"],
        ),
        # Nothing is to be rounded.
        (["method=ptq", 'quantization.overrides={"*": float}'], ["calibration", "rounding"]),
    ],
)
def test_each_step_of_the_work_is_a_phase(
    teacher: Model, overrides: list[str], names: list[str]
) -> None:
    assert list(phases(teacher, *overrides)) == names


def test_nothing_is_done_to_the_network_that_is_timed(teacher: Model) -> None:
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    made = phases(teacher, "method=qat", "distillation.epochs=3")
    assert len(made["training"]) == 3
    after = teacher.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Training lays networks out anew in memory.
    assert all(tensor.is_contiguous() for tensor in after.values())


def test_training_goes_with_images_and_epochs_and_processes(teacher: Model) -> None:
    few = phases(teacher, "method=qat", "distillation.epochs=2")["training"]
    more = phases(teacher, "method=qat", "distillation.epochs=2", trained=640)["training"]
    assert sum(more) == pytest.approx(10 * sum(few))
    shared = phases(teacher, "method=qat", "distillation.epochs=2", processes=4)["training"]
    assert sum(shared) == pytest.approx(sum(few) / 4)
    # A step is a pass of each network, and so is each of three looks at their distance.
    assert sum(few) == pytest.approx((2 + 3) * 64 * 2)


def test_real_images_are_counted_for_both_networks_and_in_their_size(teacher: Model) -> None:
    made = phases(teacher, "method=ptq", photos=10, measured_on=range(20))
    assert (len(made["agreement"]), len(made["evaluation"])) == (20, 40)
    large = f"evaluation.image_size={2 * SIDE}"
    larger = phases(teacher, "method=ptq", large, measured_on=range(20))
    assert sum(larger["evaluation"]) == pytest.approx(4 * sum(made["evaluation"]))
    # Where an epoch is chosen on real images, each epoch looks at them once.
    plain = phases(teacher, "method=qat", "distillation.epochs=2")["training"]
    chosen = phases(teacher, "method=qat", "distillation.epochs=2", selected_on=range(20))
    added = sum(chosen["training"]) - sum(plain)
    assert added == pytest.approx(2 * sum(made["evaluation"][20:]))

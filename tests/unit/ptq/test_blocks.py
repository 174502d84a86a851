"""Block reconstruction: every method, resumed, with little memory, on every kind of block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor

from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Model, Targets
from dfq.models.divergence import total_divergence
from dfq.ptq import distribution_correction
from dfq.ptq.blocks import reconstruct
from dfq.ptq.input_moments import execution_order
from dfq.ptq.objectives import METHODS
from dfq.ptq.pipeline import quantized, with_reconstructed_blocks
from dfq.ptq.units import units_of
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.settings import Quantization
from dfq.quantization.traversal import activation_quantizers, quantized_layers
from dfq.runtime.progress import Silent

IMAGES = (blobs(16, seed=5) * 255).byte()
BATCH = 8


@pytest.fixture(scope="module")
def teacher() -> Model:
    return fold(tiny_detector())


@pytest.fixture
def student(teacher: Model) -> Model:
    made = insert_quantizers(teacher.clone(), Policy(3, 4))
    calibrate(made, [IMAGES.float() / 255])
    return made


def labels(batch: int) -> Targets:
    rows = [[float(i), i % 3, 0.5, 0.5, 0.3, 0.4] for i in range(BATCH)]
    return Targets(torch.tensor(rows))


def learn(student: Model, teacher: Model, method: str, **changes: Any) -> None:
    given: dict[str, Any] = {
        "iterations": 6,
        "batch_size": BATCH,
        "targets": labels,
        **changes,
    }
    reconstruct(student, teacher, IMAGES, METHODS[method], **given)


def state(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def few_corrections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution_correction, "STEPS", 3)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"best"}))
def test_every_method_brings_the_predictions_closer(method: str, teacher: Model) -> None:
    # With two bits there is much to win.
    student = insert_quantizers(teacher.clone(), Policy(2, 6))
    calibrate(student, [IMAGES.float() / 255])
    before = float(total_divergence(student, teacher, IMAGES.split(BATCH)))
    learn(student, teacher, method, iterations=20)
    assert float(total_divergence(student, teacher, IMAGES.split(BATCH))) < before
    for name, layer in quantized_layers(student.module):
        rounded = layer.weight_quantizer(layer.weight).detach()
        torch.testing.assert_close(rounded, layer.weight, msg=name)


class Images:
    """The images of these tests, as a set."""

    def __len__(self) -> int:
        return len(IMAGES)

    def load(self, indices: list[int]) -> Tensor:
        return IMAGES[indices]


def test_a_start_from_gptq_is_kept_where_nothing_came_closer(teacher: Model) -> None:
    found = {}
    for iterations in (1, 40):
        changes = {"weight_bits": 2, "activation_bits": 6, "reconstruction": "best"}
        section = Quantization(**changes, reconstruction_iterations=iterations, refine_images=0)
        start = quantized(teacher, section.policy(), section, Images(), Silent())
        before = float(total_divergence(start, teacher, IMAGES.split(BATCH)))
        states = [state(start)]
        with_reconstructed_blocks(start, teacher, section, Images(), Silent())
        after = float(total_divergence(start, teacher, IMAGES.split(BATCH)))
        found[iterations] = same(states[0], state(start)), after < before
    # Either it came closer, or it is what it was.
    assert all(kept is not closer for kept, closer in found.values())


def test_scales_are_learned_where_the_method_says_so(student: Model, teacher: Model) -> None:
    scales = [q.log_scale.clone() for _, q in activation_quantizers(student.module) if q.bits < 8]
    twin = student.clone()
    learn(student, teacher, "adaround")
    learn(twin, teacher, "brecq")
    for model, moved in ((student, False), (twin, True)):
        now = [q.log_scale for _, q in activation_quantizers(model.module) if q.bits < 8]
        assert all(torch.equal(a, b) != moved for a, b in zip(scales, now, strict=True))


@pytest.mark.parametrize("method", ["qdrop", "pd", "pfcr"])
def test_a_run_that_was_interrupted_ends_in_the_same_bytes(
    method: str, student: Model, teacher: Model
) -> None:
    kept: list[dict[str, Tensor]] = []
    whole, part = student.clone(), student.clone()
    learn(whole, teacher, method, after=lambda done, total: kept.append(state(whole)))
    assert len(kept) > 4
    # Among the last units of pfcr are pairs of blocks.
    for done in (4, len(kept) - 1):
        part.module.load_state_dict(kept[done - 1])
        learn(part, teacher, method, first=done)
        assert same(state(part), state(whole))


def test_the_room_changes_nothing_but_the_time(student: Model, teacher: Model) -> None:
    twin = student.clone()
    learn(student, teacher, "qdrop")
    learn(twin, teacher, "qdrop", room=0)
    assert same(state(student), state(twin))


def test_dropping_has_its_effect_and_is_of_the_seed(student: Model, teacher: Model) -> None:
    made = {}
    for name, drop, seed in (("a", 0.5, 0), ("b", 0.5, 0), ("c", 0.5, 1), ("d", 0.0, 0)):
        model = student.clone()
        method = replace(METHODS["qdrop"], drop=drop)
        reconstruct(model, teacher, IMAGES, method, iterations=6, batch_size=BATCH, seed=seed)
        made[name] = state(model)
    assert same(made["a"], made["b"])
    assert not same(made["a"], made["c"])
    assert not same(made["a"], made["d"])


def test_units_are_blocks_or_layers_in_the_order_in_which_they_end(student: Model) -> None:
    order = list(execution_order(student.module, lambda: student.raw(blobs(1))))
    assert units_of(student, order, layers=True) == order
    units = units_of(student, order, layers=False)
    assert units == [name for name in student.blocks() if name in units]
    assert all(any(f"{layer}.".startswith(f"{unit}.") for unit in units) for layer in order)


def test_a_network_is_left_without_hooks_or_variables(student: Model, teacher: Model) -> None:
    names = set(student.module.state_dict())
    learn(student, teacher, "pd", iterations=1)
    assert set(student.module.state_dict()) == names
    for model in (student, teacher):
        for module in model.module.modules():
            assert "forward" not in vars(module)
            assert not module._forward_hooks
            assert not module._forward_pre_hooks

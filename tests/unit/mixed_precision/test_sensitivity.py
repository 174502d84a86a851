"""One layer at a time, against quantizing that layer by a policy and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector

from dfq.graph.fold_batchnorm import fold
from dfq.mixed_precision.sensitivity import LayerSensitivity, measure
from dfq.models.base import Detector
from dfq.models.divergence import prediction_divergence
from dfq.ptq.gptq import gptq_quantize
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.inspection import list_layers
from dfq.quantization.policy import Policy

CANDIDATES = [(2, 8), (4, 8), (8, 8), (4, 4)]
POLICY = Policy(overrides=(("model.3.cv1.conv", "w5a7"), ("model.5.*", "float")))


@pytest.fixture(scope="module")
def teacher() -> Detector:
    return fold(tiny_detector())


@pytest.fixture(scope="module")
def rows(teacher: Detector) -> dict[str, LayerSensitivity]:
    batches = blobs(6).split(4)
    found = measure(teacher, POLICY, batches, CANDIDATES, search="minmax")
    return {row.name: row for row in found}


def test_the_layers_and_what_they_may_have(
    teacher: Detector, rows: dict[str, LayerSensitivity]
) -> None:
    infos = list_layers(teacher)
    assert list(rows) == [info.name for info in infos]
    edge = teacher.boundary_layers()
    for info in infos:
        row = rows[info.name]
        assert row.macs == info.macs
        assert row.weights == teacher.module.get_submodule(info.name).weight.numel()  # type: ignore[union-attr,operator]
        if info.name in (*edge.first, *edge.last):
            assert row.widths == ((8, 8),)
        elif info.name == "model.3.cv1.conv":
            assert row.widths == ((5, 7),)
        elif info.name.startswith("model.5."):
            assert row.widths == ()
        else:
            assert row.widths == tuple(CANDIDATES)
            assert row.free
        assert len(row.divergence) == len(row.widths)


@pytest.mark.parametrize("name", ["model.1.conv", "model.8.cv3.conv"])
def test_divergence_is_that_of_the_layer_alone(
    teacher: Detector, rows: dict[str, LayerSensitivity], name: str
) -> None:
    everything = tuple((info.name, "float") for info in list_layers(teacher) if info.name != name)
    for widths, value in zip(rows[name].widths, rows[name].divergence, strict=True):
        policy = replace(
            POLICY,
            weight_bits=widths[0], activation_bits=widths[1], overrides=everything,
        )  # fmt: skip
        alone = insert_quantizers(teacher.clone(), policy)
        calibrate(alone, blobs(6).split(4), search="minmax")
        with torch.no_grad():
            pairs = alone.distillation_pairs(alone.raw(blobs(6)), teacher.raw(blobs(6)))
            expected = float(prediction_divergence(pairs, 6))
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["model.1.conv", "model.8.cv3.conv"])
def test_rounding_makes_up_within_the_layer(
    teacher: Detector, rows: dict[str, LayerSensitivity], name: str
) -> None:
    images = (blobs(6) * 255).round().to(torch.uint8)
    batch, options = images.float() / 255, [(4, 8), (4, 5), (6, 8)]
    others = tuple((info.name, "float") for info in list_layers(teacher) if info.name != name)
    policy = replace(POLICY, overrides=others)
    found = measure(teacher, policy, [batch], options, search="minmax", rounding="gptq")
    (row,) = (row for row in found if row.name == name)
    for widths, value in zip(row.widths, row.divergence, strict=True):
        alone = insert_quantizers(
            teacher.clone(), replace(policy, weight_bits=widths[0], activation_bits=widths[1])
        )
        calibrate(alone, [batch], search="minmax")
        gptq_quantize(alone, teacher, images)
        with torch.no_grad():
            pairs = alone.distillation_pairs(alone.raw(batch), teacher.raw(batch))
            expected = float(prediction_divergence(pairs, 6))
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)
    nearest = dict(zip(rows[name].widths, rows[name].divergence, strict=True))
    assert row.divergence[0] < nearest[4, 8]


def test_what_else_is_quantized_does_not_count(
    teacher: Detector, rows: dict[str, LayerSensitivity]
) -> None:
    policy = replace(POLICY, placement="everywhere")
    few = [CANDIDATES[0], CANDIDATES[-1]]
    for row in measure(teacher, policy, blobs(6).split(4), few, search="minmax"):
        known = dict(zip(rows[row.name].widths, rows[row.name].divergence, strict=True))
        assert row.divergence == tuple(known[widths] for widths in row.widths)


def test_fewer_bits_do_more(rows: dict[str, LayerSensitivity]) -> None:
    free = [row for row in rows.values() if row.free]
    assert len(free) > 5
    for row in free:
        two, four, eight, both = row.divergence
        assert two > eight > 0
        assert both > four * 0.5
    assert sum(row.divergence[0] for row in free) > 5 * sum(row.divergence[1] for row in free)


def test_the_teacher_is_left_as_it_is(teacher: Detector) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
    told: list[tuple[int, int]] = []
    measure(
        teacher, POLICY, [blobs(2)], [(4, 8), (8, 8)], search="minmax",
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    after = teacher.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert told[-1][0] == told[-1][1] == len(told)

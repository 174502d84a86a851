"""Quantizers that are put where another runtime wants them, and activations of 16 bits there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_detector import blobs, stacked, tiny_detector
from torch import Tensor

from dfq.export.program import build
from dfq.export.replacing import place_for
from dfq.graph.fold_batchnorm import fold
from dfq.mixed_precision.search import find_bits
from dfq.models.base import Detector, Targets
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.placement import PLACEMENTS
from dfq.quantization.policy import Policy
from dfq.quantization.settings import Quantization
from dfq.quantization.traversal import activation_quantizers, quantized_layers
from dfq.runs.folder import Run
from dfq.runs.loading import load_model
from dfq.runtime.progress import Silent

WIDE = [name for name, where in PLACEMENTS.items() if where.most_bits > 8]
WIDTHS = [*((8, name) for name in PLACEMENTS), *((16, name) for name in WIDE)]


def student_of(teacher: Detector, policy: Policy) -> Detector:
    student = insert_quantizers(teacher.clone(), policy)
    calibrate(student, [blobs(6)])
    return student


def off(detector: Detector, teacher: Detector) -> float:
    """Error of the predictions, as a share of their deviation."""
    with torch.no_grad():
        got, wanted = (stacked(one.raw(blobs(6, seed=3))) for one in (detector, teacher))
    return float((got - wanted).norm() / (wanted - wanted.mean(0)).norm())


@pytest.fixture(scope="module")
def teacher() -> Detector:
    return fold(tiny_detector())


@pytest.mark.parametrize(("bits", "runtime"), WIDTHS)
def test_weights_stay_and_predictions_stay_as_good(
    teacher: Detector, bits: int, runtime: str
) -> None:
    """As good as those of a network that was made for the runtime from the start."""
    before = Policy(8, bits, "same")
    student = student_of(teacher, before)
    found, policy = place_for(student, before, runtime, [blobs(6)])
    assert policy == Policy(8, bits, "same", placement="qdq", runtime=runtime)
    ours, theirs = dict(quantized_layers(student.module)), dict(quantized_layers(found.module))
    assert list(ours) == list(theirs)
    for name, layer in ours.items():
        assert torch.equal(layer.weight, theirs[name].weight), name
        step = layer.weight_quantizer.scale
        assert torch.equal(step, theirs[name].weight_quantizer.scale), name
        assert theirs[name].input_quantizer.bits == bits
    assert all(quantizer.initialised for _, quantizer in activation_quantizers(found.module))
    native = student_of(teacher, policy)
    assert {name for name, _ in activation_quantizers(found.module)} == {
        name for name, _ in activation_quantizers(native.module)
    }
    assert off(found, teacher) < 1.25 * off(native, teacher) + 1e-3


def test_grids_that_both_placements_have_are_kept(teacher: Detector) -> None:
    policy = Policy(8, 8, "same", placement="qdq", runtime="openvino")
    student = student_of(teacher, policy)
    for _, quantizer in activation_quantizers(student.module):
        # As training might have left it: no search would find this.
        quantizer.log_scale.data += 0.01
    same, _ = place_for(student, policy, "openvino", [blobs(6)])
    with torch.no_grad():
        assert torch.equal(*(stacked(one.raw(blobs(2))) for one in (same, student)))
    before = dict(activation_quantizers(student.module))
    for runtime in ("onnxruntime", "litert"):
        made, _ = place_for(student, policy, runtime, [blobs(6)])
        after = dict(activation_quantizers(made.module))
        assert {*before} < {*after}
        assert all(torch.equal(after[name].log_scale, q.log_scale) for name, q in before.items())
    # Grids without a zero point are others.
    made, _ = place_for(student, policy, "tensorrt", [blobs(6)])
    after = dict(activation_quantizers(made.module))
    assert not any(q.asymmetric for q in after.values())
    assert not any(torch.equal(after[name].log_scale, q.log_scale) for name, q in before.items())


class Images:
    """Eight images without labels."""

    def __len__(self) -> int:
        return 8

    def load(self, indices: list[int]) -> Tensor:
        return (blobs(8)[indices] * 255).round().to(torch.uint8)

    def targets(self, indices: list[int]) -> Targets:
        return Targets.from_per_image([torch.zeros(0, 5) for _ in indices])


@pytest.mark.e2e
@pytest.mark.parametrize("runtime", WIDE)
def test_a_budget_may_buy_activations_of_sixteen_bits(
    teacher: Detector, runtime: str, tmp_path: Path
) -> None:
    """What sensitivity chooses is placed, saved, loaded, and exported with these widths."""
    base = Policy(8, 8, placement="qdq", runtime=runtime)
    mixed: dict[str, Any] = {
        "candidates": [4, "w8a16"], "images": 4, "budget": "w8a12", "cost": "bit_operations",
    }  # fmt: skip
    settings = Quantization(
        weight_bits=8, placement="qdq", runtime=runtime, calibration_images=4, mixed=mixed
    )
    found = find_bits(teacher, base, settings, Images(), Silent())
    chosen = found.allocated or {}
    wide = {name for name, widths in chosen.items() if widths == (8, 16)}
    assert wide
    assert wide < set(chosen)
    policy = replace(base, overrides=tuple(found.overrides.items()))
    student = student_of(teacher, policy)
    layers = dict(quantized_layers(student.module))
    assert {name for name, layer in layers.items() if layer.input_quantizer.bits == 16} == wide
    Run(tmp_path / "run", {"seed": 0}).finish(student, policy, {}, {})
    again = load_model(tmp_path / "run")
    image = blobs(1, seed=5)
    with torch.no_grad():
        assert torch.equal(*(stacked(one.raw(image)) for one in (again, student)))
        program = build(student, runtime, image_size=64).module()(image)
        wanted = student.outputs(student.raw(image), (64, 64)).values()
    for ours, theirs in zip(program, wanted, strict=True):
        # OpenVINO's are not rounded to 16 bits, and a few values of 8 bits fall the other way.
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()

"""Where one layer gives boxes and scores, each kind has a grid of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.yolov5_files import write
from torch import Tensor

from dfq import export
from dfq.export.counting import count
from dfq.export.integer import run_in_integers
from dfq.export.opening import open_file
from dfq.export.program import build
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.models.base import Detector
from dfq.quantization.calibration import calibrate
from dfq.quantization.implied import implied_ranges
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.layers import SplitOutput
from dfq.quantization.output_quantizers import output_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.storage import restore_state, stored_state
from dfq.quantization.traversal import activation_quantizers, float_mode
from dfq.runs.folder import Run
from dfq.runs.loading import load_model

LITERT = Policy(8, 8, placement="qdq", runtime="litert")
SIDE = 64


@pytest.fixture
def uneven(tmp_path: Path) -> Detector:
    """A small YOLOv5 whose class logits are far below zero, and whose sides hardly vary."""
    detector = fold(load_detector(str(write(tmp_path / "tiny.pt"))))
    head = detector.module.detect
    with torch.no_grad():
        for conv in head.m:
            by_kind = conv.weight.view(-1, head.outputs, *conv.weight.shape[1:])
            bias = conv.bias.view(-1, head.outputs)
            by_kind[:, 2:4] *= 0.01
            by_kind[:, 5:] *= 30
            bias[:, 2:4] = 0.02
            bias[:, 5:] = -20
    return detector


def images(count: int) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))


def student_of(teacher: Detector) -> Detector:
    student = insert_quantizers(teacher.clone(), LITERT)
    calibrate(student, [images(4)])
    return student


def test_each_kind_is_as_fine_as_its_own_values(uneven: Detector) -> None:
    student = student_of(uneven)
    seen = uneven.raw(images(4))
    for name, level in zip(student.boundary_layers().last, seen, strict=True):
        layer = student.module.get_submodule(name)
        assert isinstance(layer.output_quantizer, SplitOutput)
        parts = (level[..., :2], level[..., 2:4], level[..., 4:5], level[..., 5:])
        for quantizer, part in zip(layer.output_quantizer, parts, strict=True):
            reach = float(part.max().clamp_min(0) - part.min().clamp_max(0))
            assert float(quantizer.scale) == pytest.approx(reach / 255, rel=0.02)
        steps = [float(quantizer.scale.detach()) for quantizer in layer.output_quantizer]
        # On one grid sides would all be one level.
        assert steps[3] > 20 * steps[1]
    with torch.no_grad(), float_mode(student.module):
        for got, want in zip(student.raw(images(2)), uneven.raw(images(2)), strict=True):
            assert torch.equal(got, want)


def test_all_of_them_are_known_by_their_names_and_trained(uneven: Detector) -> None:
    student = student_of(uneven)
    modules = dict(student.module.named_modules())
    found = [(n, q) for n, q in output_quantizers(student.module) if ".output_quantizer." in n]
    assert len(found) == 4 * len(student.boundary_layers().last)
    assert all(modules[name] is quantizer for name, quantizer in found)
    assert {q for _, q in found} <= {q for _, q in activation_quantizers(student.module)}
    sum(level.square().sum() for level in student.raw(images(2))).backward()
    assert all(quantizer.log_scale.grad.abs() > 0 for _, quantizer in found)


@pytest.mark.e2e
def test_a_run_and_its_file_have_them(uneven: Detector, tmp_path: Path) -> None:
    student = student_of(uneven)
    Run(tmp_path / "run", {"seed": 0, "checkpoint": uneven.fingerprint}).finish(
        student, LITERT, {}, {}
    )
    again = load_model(tmp_path / "run")
    with torch.no_grad():
        for got, want in zip(again.raw(images(2)), student.raw(images(2)), strict=True):
            assert torch.equal(got, want)
    file = open_file(export(tmp_path / "run", tmp_path / "x.tflite", image_size=SIDE), threads=1)
    program = build(again, "litert", image_size=SIDE)
    for image in images(3)[:, None]:
        found = file.run(image.numpy())
        for name, value in run_in_integers(program, image, "litert").items():
            assert torch.allclose(value, torch.from_numpy(found[name]), atol=1e-4)
    # Of the convolution that gives a level each kind is a layer, and an integer one.
    share = count(file)
    assert share.share_of_macs == 1
    assert len(share.operations) == len(list(count_convolutions(again))) + 3 * len(
        again.boundary_layers().last
    )


def count_convolutions(detector: Detector) -> list[str]:
    return [
        name
        for name, module in detector.module.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    ]


def test_no_other_runtime_needs_them(uneven: Detector) -> None:
    for runtime in ("onnxruntime", "openvino", "tensorrt"):
        student = insert_quantizers(uneven.clone(), Policy(8, 8, placement="qdq", runtime=runtime))
        assert not any(isinstance(m, SplitOutput) for m in student.module.modules())


def test_what_batchnorm_implies_is_not_taken_for_what_predictions_reach(uneven: Detector) -> None:
    """No BatchNorm follows the layers that give them."""
    student = insert_quantizers(uneven.clone(), LITERT)
    split = {name for name, _ in output_quantizers(student.module) if ".output_quantizer." in name}
    last = tuple(f"{name}." for name in student.boundary_layers().last)
    ours = {name for name in split if name.startswith(last)}
    assert ours
    assert not ours & implied_ranges(student, 6).keys()


def test_a_run_in_which_all_kinds_had_one_grid_gives_what_it_gave(uneven: Detector) -> None:
    student = student_of(uneven)
    state = {
        key: value
        for key, value in stored_state(student.module).items()
        if not any(f"{name}.output_quantizer" in key for name in student.boundary_layers().last)
    }
    for name in student.boundary_layers().last:
        split = student.module.get_submodule(name).output_quantizer
        assert isinstance(split, SplitOutput)
        shared = split[3].state_dict()
        state |= {f"{name}.output_quantizer.{key}": value for key, value in shared.items()}
        for quantizer in split:
            quantizer.load_state_dict(shared)
    again = insert_quantizers(uneven.clone(), LITERT)
    restore_state(again.module, state, "here")
    with torch.no_grad():
        for got, want in zip(again.raw(images(2)), student.raw(images(2)), strict=True):
            assert torch.equal(got, want)


def test_kinds_are_decoded_apart(uneven: Detector) -> None:
    """They are not put together in float only to be taken apart."""
    program = build(student_of(uneven), "litert", image_size=SIDE)
    every = uneven.module.detect.outputs
    moved = [
        node.meta["val"].shape[-1]
        for node in program.exported.graph.nodes
        if node.target is torch.ops.aten.permute.default and node.meta["val"].ndim == 5
    ]
    assert moved
    assert every not in moved

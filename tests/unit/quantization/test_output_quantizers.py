"""Outputs of layers, sums and concatenations on grids: all that there are, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiers import published
from support.tiny_detector import SIDE, blobs, stacked, tiny_detector
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfq.api.inspect import inspect
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.models.base import Boundary, Detector
from dfq.models.yolov5.detector import YOLOv5
from dfq.models.yolov5.network import C3, SPPF, Bottleneck, Concat
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.output_quantizers import RESULTS, count_adds_and_concats, output_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.traversal import activation_quantizers, float_mode, quantized_layers
from dfq.runs.folder import Run
from dfq.runs.loading import load_model

EVERYWHERE = Policy(8, 8, placement="everywhere")


def student_of(teacher: Detector, policy: Policy, images: Tensor, search: str = "minmax") -> Any:
    student = insert_quantizers(teacher.clone(), policy)
    calibrate(student, [images], search=search)
    return student


class Joined(TorchFunctionMode):
    """Every tensor of four dimensions that goes into a sum of two or a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Tensor] = []
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        parts = args[0] if func.__name__ == "cat" else args[:2]
        if func.__name__ in ("cat", "add") and all(
            isinstance(part, Tensor) and part.ndim == 4 for part in parts
        ):
            self.operands += parts
            self.calls += 1
        return func(*args, **(kwargs or {}))


def levels_of(x: Tensor) -> int:
    return len(x.unique())


# ---- what is found


def by_class(network: nn.Module) -> int:
    """Sums and concatenations of a YOLO network, from what its modules are."""
    count = 0
    for module in network.modules():
        kind = type(module).__name__.removeprefix("Watched")
        count += kind in ("C3", "C3k", "C3k2", "SPPF", "Concat", "C2PSA")
        count += kind == "Bottleneck" and module.add
        # Attention adds an encoding of positions that a convolution gives.
        count += kind == "Attention"
        count += 2 * (kind == "PSABlock" and module.add)
        count += kind == "SPPF" and getattr(module, "add", False)
    return count


def test_the_classes_that_are_counted() -> None:
    names = {kind.__name__ for kind in (C3, SPPF, Bottleneck, Concat)}
    assert names <= {type(module).__name__ for module in tiny_detector().module.modules()}


@pytest.mark.parametrize("source", ["tiny", published("yolo11n.yaml")])
def test_all_sums_and_concatenations_are_found(source: str) -> None:
    detector = fold(tiny_detector() if source == "tiny" else load_detector(source))
    expected = by_class(detector.module)
    assert expected == (5 if source == "tiny" else 31)
    assert count_adds_and_concats(detector) == (0, expected)
    assert count_adds_and_concats(insert_quantizers(detector.clone(), Policy(8, 8))) == (
        0,
        expected,
    )
    student = insert_quantizers(detector.clone(), EVERYWHERE)
    assert count_adds_and_concats(student) == (expected, expected)


def test_all_of_a_real_yolov5_are_found(yolov5n: Path) -> None:
    detector = fold(load_detector(yolov5n))
    student = insert_quantizers(detector.clone(), EVERYWHERE)
    # 7 residual sums; 8 blocks, the pyramid pooling, and 4 fusions of the neck concatenate.
    assert count_adds_and_concats(student) == (20, 20) == (by_class(detector.module),) * 2


def test_layers_in_float_are_not_joined_in_integers() -> None:
    """A sum of what a float layer gives has to be computed in float."""
    policy = Policy(8, 8, placement="everywhere", overrides=(("model.3.m.0.cv2.conv", "float"),))
    student = insert_quantizers(fold(tiny_detector()), policy)
    names = [name for name, _ in output_quantizers(student.module)]
    assert not any("model/3/m/0" in name for name in names)
    # Neither is the concatenation whose one part is that sum.
    assert count_adds_and_concats(student) == (3, 5)


# ---- what is computed


def test_all_that_is_joined_is_on_a_grid_of_eight_bits() -> None:
    teacher, images = fold(tiny_detector()), blobs(4)
    assert levels_of(teacher.raw(images)[0]) > 256
    student = student_of(teacher, EVERYWHERE, images)
    seen: list[Tensor] = []
    for _, layer in quantized_layers(student.module):
        layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.no_grad(), Joined() as joined:
        raw = student.raw(images)
    assert joined.calls == 5
    assert max(levels_of(operand) for operand in joined.operands) <= 256
    results = {q for _, q in output_quantizers(student.module)}
    read = [
        levels_of(x)
        for x, (_, layer) in zip(seen, quantized_layers(student.module), strict=True)
        if layer.input_quantizer in results
    ]
    # Behind a sum or a concatenation, layers read what is on a grid already.
    assert len(read) >= 5
    assert max(read) <= 256
    assert all(levels_of(level) > 256 for level in raw)


def test_layers_give_what_their_definition_says() -> None:
    """Every output but the predictions is scale * integer within the grid's bounds."""
    teacher, images = fold(tiny_detector()), blobs(4)
    student = student_of(teacher, EVERYWHERE, images)
    last = teacher.boundary_layers().last
    assert {n for n, m in quantized_layers(student.module) if m.output_quantizer is None} == {*last}
    outputs: dict[str, Tensor] = {}
    for name, layer in quantized_layers(student.module):
        layer.register_forward_hook(lambda _m, _i, y, name=name: outputs.update({name: y}))
    with torch.no_grad():
        student.raw(images)
    for name, layer in quantized_layers(student.module):
        quantizer = layer.output_quantizer
        if quantizer is not None:
            steps = outputs[name] / quantizer.scale + quantizer.zero_point.round()
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
            assert 0 <= steps.round().min() < steps.round().max() <= 255


def test_it_costs_what_eight_bits_cost() -> None:
    teacher, images = fold(tiny_detector()), blobs(12, seed=5)
    wanted = stacked(teacher.raw(images))

    def error(policy: Policy) -> float:
        got = stacked(student_of(teacher, policy, images, "mse").raw(images))
        return float((got - wanted).norm() / (wanted - wanted.mean(0)).norm())

    inputs, everywhere = error(Policy(8, 8)), error(EVERYWHERE)
    assert inputs < everywhere < 4 * inputs


def test_one_tensor_has_one_grid() -> None:
    student = insert_quantizers(fold(tiny_detector()), EVERYWHERE)
    layers = dict(quantized_layers(student.module))
    # Both read what the third convolution gives, which nothing joins.
    first, second = layers["model.3.cv1.conv"], layers["model.3.cv2.conv"]
    assert first.input_quantizer is second.input_quantizer
    # A concatenation, and one of poolings of a single tensor.
    holder = student.module.get_submodule(RESULTS)
    assert layers["model.3.cv3.conv"].input_quantizer is holder["model/3:cat:0"]
    assert holder["model/5:cat:0"] is holder["model/5/cv1:silu:0"]
    # Layers of fewer bits have grids of their own.
    narrow = insert_quantizers(fold(tiny_detector()), Policy(4, 4, placement="everywhere"))
    narrow_layers = dict(quantized_layers(narrow.module))
    holder = narrow.module.get_submodule(RESULTS)
    assert narrow_layers["model.3.cv3.conv"].input_quantizer.bits == 4
    assert {q.bits for q in holder.values()} == {8}


def test_inputs_alone_are_as_they_were() -> None:
    teacher, images = fold(tiny_detector()), blobs(4)
    classes = [type(module) for module in teacher.module.modules()]
    student = student_of(teacher, Policy(8, 8), images)
    assert Policy(8, 8) == Policy(8, 8, placement="inputs")
    names = [name for name in student.module.state_dict() if "quantizer" in name]
    ends = ("input_quantizer", "weight_quantizer")
    assert all(name.split(".")[-2] in ends for name in names)
    assert len(names) == 3 * 2 * 18
    assert len(list(activation_quantizers(student.module))) == 18
    assert not hasattr(student.module, RESULTS)
    kinds = {type(module).__name__ for module in student.module.modules()}
    assert not any(kind.startswith("Watched") for kind in kinds)
    assert [type(module) for module in teacher.module.modules()] == classes


# ---- state


def test_a_run_folder_gives_it_back_bit_for_bit(tmp_path: Path) -> None:
    teacher, images = fold(tiny_detector()), blobs(4)
    student = student_of(teacher, EVERYWHERE, images)
    wanted = student.raw(images)
    twin = student.clone()
    run = Run(tmp_path / "run", {"seed": 0})
    run.finish(student, EVERYWHERE, {}, {})
    again = load_model(tmp_path / "run")
    for other in (twin, again):
        assert all(map(torch.equal, other.raw(images), wanted))
    assert list(again.module.state_dict()) == list(student.module.state_dict())
    assert inspect(tmp_path / "run").adds_and_concats == (5, 5)
    # A twin is on its own.
    for _, quantizer in output_quantizers(twin.module):
        quantizer.log_scale.data += 1
    assert not torch.equal(twin.raw(images)[0], wanted[0])
    assert all(map(torch.equal, student.raw(images), wanted))


def test_gradients_reach_every_scale() -> None:
    teacher, images = fold(tiny_detector()), blobs(4)
    student = student_of(teacher, EVERYWHERE, images, "mse")
    student.module.requires_grad_(True)
    torch.stack([level.square().mean() for level in student.raw(images)]).sum().backward()
    for name, quantizer in student.module.named_modules():
        if isinstance(quantizer, Quantizer):
            assert quantizer.log_scale.grad is not None, name
            assert quantizer.log_scale.grad.abs().sum() > 0, name


# ---- networks that are built otherwise


class Inner(nn.Module):
    """Calls the same function as the module it is in, and one activation for all places."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 1), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) + 0.5


class Residual(nn.Sequential):
    """Has parts that it runs all, writes into what it is given, and joins what is no activation."""

    def __init__(self) -> None:
        act = nn.ReLU(inplace=True)
        super().__init__(nn.Conv2d(3, 4, 1), act, Inner(act), Inner(act))
        self.position = nn.Parameter(torch.full((1, 4, 8, 8), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        x = self[1](self[0](x)) + self.position
        y = self[3](self[2](x))
        y += x
        return torch.cat([self[1](y), x], dim=1)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Residual(), nn.Conv2d(8, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        scores = self.head(self.body(nn.functional.avg_pool2d(images, SIDE // 8)))
        # What comes after the predictions is not the network's.
        return torch.cat([scores + scores, scores], dim=1)


class WholeDetector(YOLOv5):
    """The few parts of the protocol that conversion asks for."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = Whole().eval()  # type: ignore[assignment]
        self.names, self.image_size, self.stride = ["a"], SIDE, SIDE // 2

    def raw(self, images: Tensor) -> list[Tensor]:
        return [self.module(images)]

    def boundary_layers(self) -> Boundary:
        return Boundary(("body.0",), ("head",))


def test_sums_within_sums_are_told_apart() -> None:
    images = blobs(4)
    teacher = WholeDetector()
    student = student_of(teacher, EVERYWHERE, images)
    names = {name.removeprefix(f"{RESULTS}.") for name, _ in output_quantizers(student.module)}
    # The first sum of the body is of a constant, and is what the second one takes.
    assert {name for name in names if "output" not in name} == {
        "body:add:0",
        "body/3:add:0",
        "body:add:1",
        "body:cat:0",
    }
    assert count_adds_and_concats(student) == (2, 2)
    got, wanted = student.raw(images)[0], teacher.raw(images)[0]
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()
    # Where an activation function wrote into its input, the gradient would miss it.
    student.module.requires_grad_(True)
    student.raw(images)[0].square().sum().backward()
    # The activation that all share is quantized nowhere, and nowhere twice.
    assert type(student.module.body[1]) is nn.ReLU


def test_a_grid_in_front_of_a_relu_has_no_level_below_zero() -> None:
    student = student_of(WholeDetector(), EVERYWHERE, blobs(4))
    layers = dict(quantized_layers(student.module))
    for name in ("body.0", "body.2.conv", "body.3.conv"):
        quantizer = layers[name].output_quantizer
        assert quantizer is not None
        assert quantizer.consumer == "relu"
        assert quantizer.zero_point.tolist() == [0]


def test_rectified_sums_stay_on_their_grid() -> None:
    """So that what reads them does not need another."""
    student = insert_quantizers(WholeDetector(), EVERYWHERE)
    holder = student.module.get_submodule(RESULTS)
    # A ReLU reads the sum, and what it gives is concatenated without one more quantizer.
    assert holder["body:add:1"].consumer == "relu"
    assert not any("relu" in name for name in holder)


def test_predictions_are_on_grids_of_their_own_where_the_runtime_needs_it() -> None:
    """Nothing of them is clipped: the few large values are the objects."""
    student = insert_quantizers(
        fold(tiny_detector()), Policy(8, 8, placement="qdq", runtime="litert")
    )
    images = torch.rand(4, 3, 64, 64)
    calibrate(student, [images])
    last = [student.module.get_submodule(n) for n in student.boundary_layers().last]
    # Centres, sides, objectness and classes of each.
    grids = [quantizer for layer in last for quantizer in layer.output_quantizer]
    assert len(set(grids)) == 4 * len(last)
    seen: dict[nn.Module, torch.Tensor] = {}
    with float_mode(student.module):
        for quantizer in grids:
            quantizer.register_forward_pre_hook(lambda q, x: seen.update({q: x[0]}))
        student.raw(images)
    for quantizer in grids:
        low, high = ((bound - quantizer.zero_point) * quantizer.scale for bound in (0, 255))
        step = float(quantizer.scale.detach())
        assert float(low.detach()) <= float(seen[quantizer].min()) + step
        assert float(high.detach()) >= float(seen[quantizer].max()) - step
    openvino = insert_quantizers(
        fold(tiny_detector()), Policy(8, 8, placement="qdq", runtime="openvino")
    )
    last = [openvino.module.get_submodule(n) for n in openvino.boundary_layers().last]
    assert all(layer.output_quantizer is None for layer in last)

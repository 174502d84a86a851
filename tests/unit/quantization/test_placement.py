"""Where quantizers stand, by runtime and by attribute, on a network that has all that they stand
on: layers with SiLU, a residual sum, a max-pool, an enlargement, a concatenation, predictions."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_detector import SIDE, blobs, stacked, tiny_detector
from support.toys import Toy, images, toy
from torch import Tensor, nn

from dfq.export.passes import QUANTIZE
from dfq.export.program import build
from dfq.graph.fold_batchnorm import fold
from dfq.mixed_precision.sensitivity import measure
from dfq.models.base import Detector
from dfq.models.divergence import prediction_divergence
from dfq.ptq.gptq import gptq_quantize
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.inspection import list_layers
from dfq.quantization.layers import QuantSiLU
from dfq.quantization.output_quantizers import RESULTS, output_quantizers
from dfq.quantization.placement import PLACEMENTS, Placement
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.traversal import quantized_layers
from dfq.runs.folder import Run
from dfq.runs.loading import load_float, load_model

MADE = "made"
"""Name of a placement that a test makes up."""


class Everything(nn.Module):
    """All that quantizers stand on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU()
        self.conv, self.act2 = nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()
        self.down, self.act3 = nn.Conv2d(8, 8, 3, 2, padding=1), nn.SiLU()
        self.pool, self.up = nn.MaxPool2d(3, 1, 1), nn.Upsample(scale_factor=2)
        self.fuse, self.act4 = nn.Conv2d(24, 8, 1), nn.SiLU()
        self.last = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = x + self.act2(self.conv(x))
        small = self.act3(self.down(x))
        y = torch.cat([x, self.pool(x), self.up(small)], dim=1)
        return self.last(self.act4(self.fuse(y)))


def everything() -> Toy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Toy(Everything(), ("last",))


def placed(detector: Detector, runtime: str, seen: Tensor | None = None, **more: Any) -> Detector:
    policy = Policy(8, 8, "same", placement="qdq", runtime=runtime, **more)
    student = insert_quantizers(detector.clone(), policy)
    calibrate(student, [images(4, seed=7) if seen is None else seen], search="minmax")
    return student


def grids(student: Detector) -> set[frozenset[str]]:
    """The places of each quantizer of activations: those that share one together. A function's
    result is named by function and number of its call."""
    found: dict[nn.Module, set[str]] = {}
    for name, module in student.module.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer) and "weight_quantizer" not in name:
            short = name.removeprefix(f"{RESULTS}.:").replace("_quantizer", "")
            found.setdefault(module, set()).add(short)
    return {frozenset(places) for places in found.values()}


def together(*places: str) -> frozenset[str]:
    return frozenset(places)


# The first convolution's activation is read by the second one and added; the sum is read by the
# third one, pooled and concatenated with what that gives, enlarged.
FIRST = together("silu:0", "conv.input")
ONE = together("add:0", "down.input", "silu:2", "cat:0", "fuse.input")
ALONE = {together("stem.input"), together("last.input")}
OUTPUTS = {together(f"{name}.output") for name in ("stem", "conv", "down", "fuse")}
ADDED = together("silu:1")

WHERE = {
    "onnxruntime": ALONE | OUTPUTS | {FIRST, ADDED, ONE},
    "openvino": ALONE | {FIRST, ONE},
    "tensorrt": ALONE | {FIRST, ONE},
    "litert": ALONE | OUTPUTS | {FIRST, ADDED, ONE, together("last.output")},
}
SIGMOIDS = {"onnxruntime": 1 / 255, "openvino": None, "tensorrt": None, "litert": 1 / 256}


@pytest.mark.parametrize("runtime", PLACEMENTS)
def test_quantizers_stand_where_the_runtime_needs_them(runtime: str) -> None:
    student = placed(everything(), runtime)
    assert grids(student) == WHERE[runtime]
    steps = {
        module.step if isinstance(module, QuantSiLU) else None
        for name, module in student.module.named_children()
        if name.startswith("act")
    }
    assert steps == {SIGMOIDS[runtime]}
    symmetric = {not q.asymmetric for q in student.module.modules() if isinstance(q, Quantizer)}
    assert symmetric == ({True} if runtime == "tensorrt" else {True, False})
    # Weights of 8 bits have no zero point anywhere; those of LiteRT no -128 either.
    lowest = {layer.weight_quantizer.bounds[0] for _, layer in quantized_layers(student.module)}
    assert lowest == ({-127} if runtime == "litert" else {-128})


@pytest.mark.parametrize("runtime", PLACEMENTS)
def test_integers_are_of_the_runtimes_type(runtime: str) -> None:
    program = build(placed(everything(), runtime), runtime, image_size=16)
    nodes = [node for node in program.exported.graph.nodes if node.target is QUANTIZE]
    signed = runtime in ("tensorrt", "litert")
    assert {node.args[5] for node in nodes} == {torch.int8 if signed else torch.uint8}
    if runtime == "tensorrt":
        assert {node.args[2] for node in nodes} == {0}


# ---- each attribute by itself


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A student placed by a `Placement` of these attributes."""

    def make(detector: Detector | None = None, /, **attributes: Any) -> Detector:
        monkeypatch.setitem(PLACEMENTS, MADE, Placement(**attributes))
        return placed(everything() if detector is None else detector, MADE)

    return make


OWN_GRIDS = {
    *(together("add:0", "down.input"), together("cat:0", "fuse.input"), together("silu:2")),
    *(FIRST, ADDED),
}
"""Without one grid for all: of the sum, of what goes in beside it, of what comes out."""

SEEN = {
    ("outputs",): ALONE | OUTPUTS | OWN_GRIDS,
    ("fused_sums",): ALONE | (OWN_GRIDS - {ADDED}),
    ("one_grid",): ALONE | {FIRST, ADDED, ONE},
    ("outputs", "predictions"): ALONE | OUTPUTS | OWN_GRIDS | {together("last.output")},
}
"""By the attributes that are set, where quantizers then stand."""


def test_without_any_attribute_what_is_joined_is_on_grids_of_its_own(made: Any) -> None:
    assert grids(made()) == ALONE | OWN_GRIDS


@pytest.mark.parametrize("attributes", SEEN, ids=" and ".join)
def test_an_attribute_changes_where_they_stand(made: Any, attributes: tuple[str, ...]) -> None:
    assert grids(made(**dict.fromkeys(attributes, True))) == SEEN[attributes]


def test_an_average_is_on_the_grid_of_what_it_averages(made: Any) -> None:
    for averages in (False, True):
        student = made(toy("average"), averages=averages)
        found = {name.split(":")[1]: q for name, q in output_quantizers(student.module)}
        assert set(found) == ({"silu", "avg_pool2d"} if averages else set())
        after = student.module[5].input_quantizer
        assert all(quantizer is after for quantizer in found.values())


def test_without_joins_inputs_alone_are_on_grids(made: Any) -> None:
    names = ("stem", "conv", "down", "fuse", "last")
    assert grids(made(adds_and_concats=False)) == {together(f"{name}.input") for name in names}


def test_the_sigmoid_is_on_a_grid_of_the_step_where_its_operand_is(made: Any) -> None:
    step = 1 / 256
    student = made(outputs=True, sigmoid_step=step)
    seen: dict[str, Tensor] = {}

    def watch(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["gate"], seen["x"] = output / inputs[0], inputs[0]

    # Of what it gives nothing is joined, and so put on another grid.
    student.module.act4.register_forward_hook(watch)
    with torch.no_grad():
        student.raw(images(1, seed=3))
    large = seen["x"].abs() > 0.05
    levels = seen["gate"][large] / step
    assert large.sum() > 100
    assert (levels - levels.round()).abs().max() < 1e-2
    wanted = torch.sigmoid(seen["x"])[large]
    assert (seen["gate"][large] - wanted).abs().max() <= 0.51 * step
    # Where the operand is on no grid, SiLU stays one function.
    inner = made(sigmoid_step=step).module
    assert not any(isinstance(module, QuantSiLU) for module in inner.modules())


def test_symmetric_grids_have_no_zero_point(made: Any) -> None:
    for symmetric in (False, True):
        student = made(outputs=True, predictions=True, symmetric=symmetric)
        points = {
            float(q.zero_point.detach())
            for q in student.module.modules()
            if isinstance(q, Quantizer) and q.channels == 1
        }
        assert (points == {0.0}) == symmetric
        # And say so: a policy that asks for zero points is overruled.
        asked = Policy(placement="qdq", runtime=MADE, activations="asymmetric")
        assert asked.asymmetric != symmetric


def test_signed_integers_are_the_same_values(made: Any) -> None:
    image, outputs = images(1, seed=3), []
    for signed in (False, True):
        program = build(made(outputs=True, signed=signed), MADE, image_size=16)
        kinds = {n.args[5] for n in program.exported.graph.nodes if n.target is QUANTIZE}
        assert kinds == {torch.int8 if signed else torch.uint8}
        outputs.append(program.module()(image)[0])
    assert torch.equal(*outputs)
    assert outputs[0].unique().numel() > 100


def test_narrow_weights_end_one_level_earlier_and_still_reach_as_far(made: Any) -> None:
    detector = everything()
    # One channel reaches further below zero than above, one the other way round.
    weight = detector.module.conv.weight.data  # type: ignore[union-attr]
    weight[0, 0, 0, 0], weight[1, 0, 0, 0] = -3.0, 3.0
    for narrow, lowest in ((False, -128), (True, -127)):
        layer = made(detector, narrow_weights=narrow).module.conv
        integers = layer.weight_quantizer.integers(layer.weight)
        assert float(integers[0].min()) == lowest
        assert float(integers[1].max()) == 127
        got = layer.weight_quantizer(layer.weight).detach()
        step = layer.weight_quantizer.scale.detach().view(-1, 1, 1, 1)
        assert ((got - weight).abs() <= 0.51 * step).all()


def test_narrow_weights_are_so_at_eight_bits_alone(made: Any) -> None:
    """Below, the least level is in no runtime's way, and is used as without."""
    found = []
    for narrow in (False, True):
        made(narrow_weights=narrow)
        policy = Policy(4, 8, "same", weight_grid="symmetric", placement="qdq", runtime=MADE)
        student = insert_quantizers(everything(), policy)
        calibrate(student, [images(4)], search="minmax")
        found.append(
            [layer.weight_quantizer.scale for _, layer in quantized_layers(student.module)]
        )
    assert all(map(torch.equal, *found))


def test_every_attribute_has_a_test_that_sees_it() -> None:
    elsewhere = {
        "adds_and_concats",
        "averages",
        "sigmoid_step",
        "symmetric",
        "signed",
        "narrow_weights",
        "most_bits",
        "least_bits",
    }
    tested = {name for names in SEEN for name in names} | elsewhere
    assert {one.name for one in fields(Placement)} == tested


# ---- runs


@pytest.mark.parametrize("runtime", PLACEMENTS)
def test_a_run_folder_gives_it_back_bit_for_bit(runtime: str, tmp_path: Path) -> None:
    teacher = fold(tiny_detector())
    policy = Policy(4, 8, placement="qdq", runtime=runtime)
    student = insert_quantizers(teacher.clone(), policy)
    calibrate(student, [blobs(4)])
    pixels = (blobs(4) * 255).round().to(torch.uint8)
    gptq_quantize(student, teacher, pixels)
    with torch.no_grad():
        wanted = student.raw(blobs(4, seed=2))
        Run(tmp_path / "run", {"seed": 0}).finish(student, policy, {}, {})
        again = load_model(tmp_path / "run")
        assert all(map(torch.equal, again.raw(blobs(4, seed=2)), wanted))
    assert grids(again) == grids(student)
    kinds = [type(module) for module in student.module.modules()]
    assert [k.__name__ for k in kinds] == [type(m).__name__ for m in again.module.modules()]


@pytest.mark.parametrize("runtime", PLACEMENTS)
def test_rounding_makes_up_for_its_errors_under_every_placement(runtime: str) -> None:
    """At 3 bits, against rounding to the nearest level, both under the same placement."""
    teacher, batch = fold(tiny_detector()), blobs(8)
    policy = Policy(3, 8, placement="qdq", runtime=runtime)
    with torch.no_grad():
        wanted = stacked(teacher.raw(batch))
        student = insert_quantizers(teacher.clone(), policy)
        calibrate(student, [batch])
        before = stacked(student.raw(batch))
        gptq_quantize(student, teacher, (batch * 255).round().to(torch.uint8))
        after = stacked(student.raw(batch))
    assert (after - wanted).norm() < 0.8 * (before - wanted).norm()


@pytest.mark.parametrize("runtime", PLACEMENTS)
def test_sensitivity_is_that_of_a_layer_and_not_of_the_placement(runtime: str) -> None:
    """But for what grids of layers the placement itself has: symmetric ones, and narrow weights."""
    teacher, few = fold(tiny_detector()), [(4, 8), (8, 16)]
    names = ("model.1.conv", "model.8.cv3.conv")
    others = tuple(
        (info.name, "float") for info in list_layers(teacher, SIDE) if info.name not in names
    )
    policy = Policy(placement="qdq", runtime=runtime, overrides=others)
    rows = measure(teacher, policy, [blobs(4)], few, search="minmax")
    found = {row.name: row.divergence for row in rows if row.free}
    assert set(found) == set(names)
    where = PLACEMENTS[runtime]
    for name in names:
        rest = tuple((other, "float") for other in (*names, *dict(others)) if other != name)
        for widths, value in zip(few, found[name], strict=True):
            alone = insert_quantizers(
                teacher.clone(),
                Policy(
                    *widths,
                    overrides=rest,
                    activations="symmetric" if where.symmetric else "asymmetric",
                ),
            )
            layer = dict(quantized_layers(alone.module))[name]
            layer.weight_quantizer.narrow = where.narrow_weights
            calibrate(alone, [blobs(4)], search="minmax")
            with torch.no_grad():
                pairs = alone.distillation_pairs(alone.raw(blobs(4)), teacher.raw(blobs(4)))
                wanted = float(prediction_divergence(pairs, 4))
            assert value == pytest.approx(wanted, rel=1e-3, abs=1e-7)


@pytest.mark.e2e
def test_a_run_of_a_network_of_many_modules(tmp_path: Path) -> None:
    """Quantizers come on top of what bounds a network's description."""
    teacher = fold(load_float("yolov9t.yaml", trust=False, device="cpu"))
    policy = Policy(8, 8, placement="qdq")
    student = insert_quantizers(teacher, policy)
    calibrate(student, [blobs(1)], search="minmax")
    Run(tmp_path / "run", {"seed": 0}).finish(student, policy, {}, {})
    again = load_model(tmp_path / "run")
    assert grids(again) == grids(student)


class Merged(nn.Module):
    """As Ultralytics' RepConv: of three branches one is no more, and 0 stands for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.act, self.out = nn.SiLU(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        gone = 0
        return self.out(self.act(self.first(x) + self.second(x) + gone))


@pytest.mark.parametrize("runtime", ["onnxruntime", "litert"])
def test_zero_that_is_added_hides_no_grid(runtime: str) -> None:
    student = insert_quantizers(
        Toy(Merged(), last=("out",)), Policy(8, 8, placement="qdq", runtime=runtime)
    )
    assert isinstance(student.module.act, QuantSiLU)
    calibrate(student, [images(2)])
    graph = build(student, runtime, image_size=SIDE).exported.graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    # Of the sum alone, and its sigmoid is computed of it.
    assert names.count("aten.add.Tensor") == 1
    assert "aten.silu.default" not in names

"""Files of whole detectors against the rules of their runtimes, which are written down apart from
what exports; and that a grid of boxes never takes the scores with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from support import litert_rules, small_ultralytics, tensorrt_rules
from support.toys import exported, policy_of
from torch import Tensor, nn
from torchvision.ops import box_iou

from dfq.export.opened import open_exported
from dfq.export.opening import LiteRtFile
from dfq.export.program import build
from dfq.export.structure import structure_faults
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.models.base import Detector
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.placement import PLACEMENTS
from dfq.quantization.policy import Policy
from dfq.runs.loading import load_model

# Files of the runtimes, which take their time.
pytestmark = pytest.mark.e2e

# ---- TensorRT


@pytest.fixture(scope="session")
def for_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Detector, str], Path]:
    """The file of a detector, quantized for TensorRT, at 64 px; one for each name."""

    @functools.cache
    def made(name: str, runtime: str = "tensorrt") -> Path:
        detector = fold(load_model("demo") if name == "demo" else load_detector(name))
        detector = detector.clone()
        detector.image_size = 64
        insert_quantizers(detector, Policy(8, 8, 8, placement="qdq", runtime=runtime))
        calibrate(detector, [torch.rand(2, 3, 64, 64)], search="minmax")
        return exported(detector, runtime, tmp_path_factory.mktemp("trt"), (8, 8))[1]

    return made  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["demo", "yolo11n.yaml", "yolov5n"])
def test_a_whole_detector_keeps_to_the_rules_of_tensorrt(
    for_tensorrt: Any, name: str, request: pytest.FixtureRequest
) -> None:
    if name == "yolov5n":
        name = str(request.getfixturevalue("yolov5n"))
    path = for_tensorrt(name)
    assert tensorrt_rules.violations(path) == []
    assert structure_faults(path) == []
    # All layers are looked at, and the sums, concatenations and so on between them.
    graph = tensorrt_rules.Graph(path)
    kinds = ("Add", "Concat", "MaxPool", "Resize")
    found = [sum(id(node) in graph.inner for node in graph.of_kind(kind)) for kind in kinds]
    assert len(graph.quantized_layers()) == len(graph.of_kind("Conv"))
    assert found == ([7, 13, 3, 2] if "yolov5n" in name else [14, 17, 3, 2])


class Altered:
    """The graph of a file, to do something wrong to."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.graph = self.model.graph
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def first(self, kind: str) -> Any:
        return next(node for node in self.graph.node if node.op_type == kind)

    def constant(self, name: str) -> Any:
        return next(one for one in self.graph.initializer if one.name == name)

    def store(self, name: str, value: Any) -> None:
        self.constant(name).CopyFrom(numpy_helper.from_array(np.asarray(value), name))

    def off_grid(self, name: str) -> str:
        """What a value was before it was put on the grid that it is on."""
        return str(self.makers[self.makers[name].input[0]].input[0])

    def on_grid(self, name: str, step: float = 0.9) -> str:
        """A value on a grid of its own."""
        for end, value in (("step", np.float32(step)), ("zero", np.int8(0))):
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"x.{end}"))
        rest = ["x.step", "x.zero"]
        self.graph.node.append(helper.make_node("QuantizeLinear", [name, *rest], ["x.q"]))
        self.graph.node.append(helper.make_node("DequantizeLinear", ["x.q", *rest], ["x.d"]))
        return "x.d"

    def sum(self) -> tuple[Any, int]:
        """The first sum, and which of its operands is on a grid."""
        for node in self.graph.node:
            kinds = [self.makers[n].op_type if n in self.makers else "" for n in node.input]
            if node.op_type == "Add" and "DequantizeLinear" in kinds:
                return node, kinds.index("DequantizeLinear")
        raise AssertionError("no sum")


def zero_point(file: Altered) -> None:
    file.store(file.first("QuantizeLinear").input[2], np.int8(3))


def unsigned(file: Altered) -> None:
    file.store(file.first("QuantizeLinear").input[2], np.uint8(0))


def one_step_for_all_outputs(file: Altered) -> None:
    file.store(file.makers[file.first("Conv").input[1]].input[1], np.float32(0.1))


def bias_of_integers(file: Altered) -> None:
    # Biases of zeros are left out.
    convolutions = (node for node in file.graph.node if node.op_type == "Conv")
    name = next(node.input[2] for node in convolutions if len(node.input) > 2)
    values = numpy_helper.to_array(file.constant(name))
    file.store(name, (values * 100).astype(np.int32))


def input_in_float(file: Altered) -> None:
    node = file.first("Conv")
    node.input[0] = file.off_grid(node.input[0])


def grid_before_activation(file: Altered) -> None:
    node = file.first("Sigmoid")
    node.input[0] = file.on_grid(node.input[0])


def grid_within_activation(file: Altered) -> None:
    gate = file.first("Sigmoid").output[0]
    reader = next(node for node in file.graph.node if gate in node.input)
    reader.input[list(reader.input).index(gate)] = file.on_grid(gate)


def another_step_in_a_concatenation(file: Altered) -> None:
    node = file.first("Concat")
    node.input[0] = file.on_grid(file.off_grid(node.input[0]))


def another_step_into_a_pooling(file: Altered) -> None:
    node = file.first("MaxPool")
    node.input[0] = file.on_grid(file.off_grid(node.input[0]))


def residual_in_float(file: Altered) -> None:
    node, place = file.sum()
    node.input[place] = file.off_grid(node.input[place])


def both_operands_on_grids(file: Altered) -> None:
    node, place = file.sum()
    node.input[1 - place] = file.on_grid(node.input[1 - place])


def the_wrong_operand_on_a_grid(file: Altered) -> None:
    both_operands_on_grids(file)
    residual_in_float(file)


WRONG: dict[Callable[[Altered], None], str] = {
    zero_point: "zero point",
    unsigned: "not int8",
    one_step_for_all_outputs: "weight",
    bias_of_integers: "bias",
    input_in_float: "input",
    grid_before_activation: "activation",
    grid_within_activation: "activation",
    another_step_in_a_concatenation: "concat",
    another_step_into_a_pooling: "keeping",
    residual_in_float: "sum",
    both_operands_on_grids: "sum",
    the_wrong_operand_on_a_grid: "sum",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_what_breaks_a_rule_is_reported(
    for_tensorrt: Any, change: Callable[[Altered], None], tmp_path: Path
) -> None:
    file = Altered(for_tensorrt("yolo11n.yaml"))
    change(file)
    onnx.save(file.model, tmp_path / "wrong.onnx")
    found = tensorrt_rules.violations(tmp_path / "wrong.onnx")
    assert found
    assert {line.partition(":")[0] for line in found} == {WRONG[change]}


# ---- scores


SIDE = 640
DEEP: dict[str, Any] = {
    "backbone": [
        *([-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "Conv", [32, 3, 2]]),
        *([-1, 1, "C2f", [32, True]], [-1, 1, "Conv", [64, 3, 2]], [-1, 1, "Conv", [64, 3, 2]]),
        [-1, 1, "SPPF", [64, 5]],
    ],
    "head": [
        *([-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [[-1, 4], 1, "Concat", [1]]),
        *([-1, 1, "C2f", [64]], [[9, 6], 1, "Detect", ["nc"]]),
    ],
}
THRESHOLD = 0.05


def coarse(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return nn.functional.interpolate(
        torch.rand(count, 3, 20, 20, generator=generator), (SIDE, SIDE), mode="bilinear"
    )


@pytest.fixture(scope="session")
def unsure(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """Distances by distribution, boxes to 600 px, and logits of the categories from -12 to -2."""
    path = tmp_path_factory.mktemp("unsure") / "net.pt"
    detector: Any = fold(load_detector(small_ultralytics.save(network(), path)))
    detector.image_size = SIDE
    ends = {".cv2.": ("boxes", -4.0, 4.0), ".cv3.": ("scores", -12.0, -2.0)}
    with torch.no_grad():
        raw = detector.raw(coarse(2)).one2many
        for part, (name, low, high) in ends.items():
            values = getattr(raw, name)
            factor = (high - low) / (values.max() - values.min())
            for last in detector.boundary_layers().last:
                if part in last:
                    layer = detector.module.get_submodule(last)
                    layer.weight.mul_(factor)
                    layer.bias.sub_(values.min()).mul_(factor).add_(low)
    return detector  # type: ignore[no-any-return]


def network() -> Any:
    return small_ultralytics.network(**DEEP)


def quantized_for(detector: Detector, runtime: str) -> Detector:
    student = insert_quantizers(detector.clone(), policy_of((8, 8), runtime))
    calibrate(student, [coarse(2)])
    return student


def require_kept(boxes: Tensor, scores: Tensor, wanted: dict[str, Tensor]) -> None:
    """What the float network gives a score at the threshold or above keeps score and box."""
    seen = wanted["scores"].amax(-1) > THRESHOLD
    before, after = wanted["scores"].amax(-1)[seen], scores.amax(-1)[seen]
    assert seen.sum() > 300
    assert (after > 0.8 * before).float().mean() > 0.98
    assert (after < 1.25 * before).float().mean() > 0.98
    pairs = zip(boxes[seen][::20], wanted["boxes"][seen][::20], strict=True)
    overlap = torch.stack([box_iou(a[None], b[None])[0, 0] for a, b in pairs])
    assert overlap.median() > 0.9
    # And that of the others are no detections now.
    others = scores.amax(-1)[wanted["scores"].amax(-1) < THRESHOLD / 2]
    assert (others < THRESHOLD).float().mean() > 0.98


@pytest.mark.parametrize("runtime", PLACEMENTS)
def test_scores_far_below_the_boxes_range_do_not_vanish(unsure: Detector, runtime: str) -> None:
    images = coarse(1)
    with torch.no_grad():
        wanted = unsure.outputs(unsure.raw(images), (SIDE, SIDE))
        assert (wanted["boxes"][..., 2] - wanted["boxes"][..., 0]).max() > 500
        program = build(quantized_for(unsure, runtime), runtime, image_size=SIDE)
        found = dict(zip(program.outputs, program.module()(images), strict=True))
    require_kept(found["boxes"], found["scores"], wanted)
    # With one step for both, which is what is usually done to them, they do.
    step = float(wanted["boxes"].max()) / 255
    with pytest.raises(AssertionError):
        require_kept(found["boxes"], (found["scores"] / step).round() * step, wanted)


# ---- LiteRT


@pytest.fixture(scope="session")
def for_litert(unsure: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("litert")
    return exported(quantized_for(unsure, "litert"), "litert", folder, (8, 8))[1]


def test_a_whole_detector_keeps_to_the_rules_of_litert(for_litert: Path, unsure: Detector) -> None:
    assert litert_rules.violations(for_litert) == []
    operations, _ = litert_rules.operations_of(for_litert)
    whole = [one.name for one in operations if one.outputs[0].kind == "INT8"]
    layers = [m for m in unsure.module.modules() if isinstance(m, nn.Conv2d)]
    # But for the one that weighs distances, which is constant.
    assert whole.count("CONV_2D") == len(layers) - 1
    assert whole.count("CONCATENATION") >= 4
    assert whole.count("MAX_POOL_2D") == 3
    # Scores and boxes leave in float, apart.
    assert {one["dtype"] for one in LiteRtFile(for_litert, 1).interpreter.get_output_details()} == {
        np.float32
    }
    images = coarse(1)
    found = {
        k: torch.from_numpy(v) for k, v in open_exported(for_litert).run(images.numpy()).items()
    }
    with torch.no_grad():
        wanted = unsure.outputs(unsure.raw(images), (SIDE, SIDE))
    require_kept(found["boxes"], found["scores"], wanted)
    # Of this machine there is nothing in it.
    for folder in (Path(__file__).parents[3], for_litert.parent, Path(unsure.source).parent):
        assert str(folder).encode() not in for_litert.read_bytes()


@pytest.mark.parametrize(
    ("operation", "rule"),
    [
        ("CONCATENATION", "keeping"),
        ("MAX_POOL_2D", "keeping"),
        ("LOGISTIC", "share"),
        ("CONV_2D", "bias"),
        ("-128", "weight"),
    ],
)
def test_what_breaks_a_rule_of_litert_is_reported(
    for_litert: Path, operation: str, rule: str, tmp_path: Path
) -> None:
    from ai_edge_litert import schema_py_generated as schema

    flatbuffers = pytest.importorskip("flatbuffers")
    model = schema.ModelT.InitFromPackedBuf(for_litert.read_bytes(), 0)
    graph = model.subgraphs[0]
    name = "CONV_2D" if operation == "-128" else operation
    kind = getattr(schema.BuiltinOperator, name)
    one = next(
        one
        for one in graph.operators
        if model.operatorCodes[one.opcodeIndex].builtinCode == kind
        and graph.tensors[one.outputs[0]].type == schema.TensorType.INT8
    )
    if operation == "-128":
        buffer = model.buffers[graph.tensors[one.inputs[1]].buffer]
        buffer.data = [128, *buffer.data[1:]]
    else:
        which = one.inputs[2] if operation == "CONV_2D" else one.outputs[0]
        steps = graph.tensors[which].quantization.scale
        graph.tensors[which].quantization.scale = [1.5 * float(step) for step in steps]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    (tmp_path / "wrong.tflite").write_bytes(bytes(builder.Output()))
    found = litert_rules.violations(tmp_path / "wrong.tflite")
    assert rule in {line.partition(":")[0] for line in found}

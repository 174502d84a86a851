"""Files against the reference program, over layers, bit widths and runtimes: what they compute, and
that they compute it in integers."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.counting import layers, operations
from support.toys import NETWORKS, Toy, exported, images, quantized, several, toy
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.export.integer import AVERAGES, run_in_integers
from dfq.export.kernels import OnnxRuntimeKernels
from dfq.export.on_grid import OnGrid
from dfq.export.opening import open_file
from dfq.export.passes import QUANTIZE, grid_at
from dfq.export.program import build
from dfq.models.base import Detector
from dfq.quantization.output_quantizers import output_quantizers

# Files of the runtimes, which take their time.
pytestmark = pytest.mark.e2e

AVERAGING = ("average", "adaptive average", "bilinear")
"""Halves between two integers are frequent there, and runtimes round each in its own way."""

LAYERS = {
    **dict.fromkeys(("silu", "relu", "no bias", "depthwise", "grouped", "strided"), (3, 0)),
    **dict.fromkeys(("dilated", "reflecting", "deconv", "residual", "residual relu"), (3, 0)),
    **dict.fromkeys(("upsample", "max-pool", "pooled", "linear"), (2, 0)),
    **dict.fromkeys(AVERAGING, (3, 0)),
    "overlapping deconv": (2, 1),
    "concat": (4, 0),
    "mixed": (5, 0),
    "attention": (4, 0),
    "c2psa": (9, 0),
}
"""By network, how many layers of weights are to be computed in integers, and how many in float: of
transposed convolutions, those alone whose patches do not overlap are quantized."""

CASES = [
    *((runtime, (8, 8), False) for runtime in ("onnxruntime", "openvino", "litert")),
    *((runtime, (4, 8), False) for runtime in ("onnxruntime", "openvino", "litert")),
    *((runtime, (8, 16), False) for runtime in ("onnxruntime", "openvino")),
    ("onnxruntime", (4, 8), True),
]


class Made(NamedTuple):
    """What one file gives, and what it is to give, by network.

    Attributes:
        student: of which it was made.
        trained, program, file: outputs of the network that is trained, of the reference program,
            and of the file.
        path: of the file.
    """

    student: Detector
    trained: dict[str, list[Tensor]]
    program: dict[str, list[Tensor]]
    file: dict[str, list[Tensor]]
    path: Path


def by_network(outputs: Any) -> dict[str, list[Tensor]]:
    """Outputs one after another, of which "concat" has two."""
    rest = iter(outputs)
    return {name: [next(rest) for _ in range(1 + (name == "concat"))] for name in NETWORKS}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(runtime: str, widths: tuple[int, int], int4: bool) -> Made:
        student = quantized(several(list(NETWORKS)), runtime, widths)
        folder = tmp_path_factory.mktemp("made")
        program, path = exported(student, runtime, folder, widths, int4=int4)
        image = images(1, seed=3)
        with torch.no_grad():
            trained = student.outputs(student.raw(image), (16, 16)).values()
            wanted = program.module()(image)
        file = open_file(path, threads=1).run(image.numpy())
        found = [torch.from_numpy(value) for value in file.values()]
        return Made(student, *map(by_network, (trained, wanted, found)), path)

    return make


def step_of(wanted: Tensor) -> float:
    """Of a grid of 8 bits, or of as many levels as there are, that holds what came out."""
    levels = wanted.unique()
    between = float((levels[-1] - levels[0]) / 255)
    return max(between, float(levels.diff().min())) if len(levels) <= 256 else between


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("runtime", "widths", "int4"), CASES)
def test_a_file_gives_what_the_reference_program_gives(
    made: Any, runtime: str, widths: tuple[int, int], int4: bool, network: str
) -> None:
    """Within a step, and that in few places: where a sum lies half-way between two integers."""
    found = made(runtime, widths, int4)
    for wanted, given in zip(found.program[network], found.file[network], strict=True):
        assert given.shape == wanted.shape
        off, step = (given - wanted).abs(), step_of(wanted)
        # Of what 16 bits resolve, hardly anything is left.
        step *= 0.05 if widths[1] == 16 else 1.05
        if network in ("c2psa", "mixed"):
            # Five layers and more, in which such differences meet.
            assert off.max() <= 4 * step
            assert off.mean() <= 0.5 * step
        else:
            assert off.max() <= step
            few = 0.25 if network in AVERAGING else 0.03
            assert (off > 0.05 * step).float().mean() < few


@pytest.mark.parametrize(
    ("network", "runtime"),
    [
        *((network, "litert") for network in AVERAGING),
        *((network, "onnxruntime") for network in AVERAGING[:2]),
    ],
)
def test_averages_are_rounded_as_the_runtime_rounds_them(
    network: str, runtime: str, tmp_path: Path
) -> None:
    program, path = exported(quantized(toy(network), runtime, (8, 8)), runtime, tmp_path, (8, 8))
    image = images(1, seed=3)
    (wanted,) = run_in_integers(program, image, runtime).values()
    (given,) = open_file(path, threads=1).run(image.numpy()).values()
    assert np.abs(given - wanted.numpy()).max() < 1e-5


@pytest.mark.parametrize("runtime", ["onnxruntime", "litert"])
@pytest.mark.parametrize("network", AVERAGING)
def test_an_average_has_the_grid_of_what_it_averages(network: str, runtime: str) -> None:
    """LiteRT's converter gives both the grid of the result, and clips what is averaged."""
    program = build(quantized(toy(network), runtime, (8, 8)), runtime, image_size=16)
    averages = [node for node in program.exported.graph.nodes if node.target in AVERAGES]
    for node in averages:
        (after,) = node.users
        assert after.target is QUANTIZE
        assert grid_at(node.args[0]) == tuple(after.args[1:6])
    assert len(averages) == 1


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("runtime", "widths", "int4"), CASES)
def test_what_is_trained_is_what_is_shipped(
    made: Any, runtime: str, widths: tuple[int, int], int4: bool, network: str
) -> None:
    found = made(runtime, widths, int4)
    for wanted, given in zip(found.trained[network], found.program[network], strict=True):
        off, step = (given - wanted).abs(), step_of(wanted)
        assert off.max() <= 1.05 * step
        few = 0.25 if network in AVERAGING else 0.01
        assert (off > 0.05 * step).float().mean() < few


@pytest.mark.parametrize(
    ("runtime", "widths", "int4"), [case for case in CASES if case[1][1] == 8 and not case[2]]
)
def test_layers_are_computed_in_integers(
    made: Any, runtime: str, widths: tuple[int, int], int4: bool
) -> None:
    wanted = tuple(sum(counts) for counts in zip(*LAYERS.values(), strict=True))
    assert layers(made(runtime, widths, int4).path) == wanted


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "litert"])
def test_sums_poolings_and_concatenations_are_too(made: Any, runtime: str) -> None:
    """Of 5 sums (2 residual networks, 3 in C2PSA), 3 concatenations, 2 poolings, 1 enlargement."""
    found = operations(made(runtime, (8, 8), False).path)
    if runtime == "onnxruntime":
        counts = [found[name, "int8"] for name in ("QLinearAdd", "QLinearConcat")]
        assert counts == [5, 3]
        # 8 within blocks, one alone and one depthwise ... all that follow layers.
        assert found["QLinearSigmoid", "int8"] == found["QLinearMul", "int8"]
        assert found["Sigmoid", "float"] == found["Add", "float"] == found["Concat", "float"] == 0
    elif runtime == "openvino":
        assert found["Concatenation", "int8"] == 3
        assert found["Pooling", "int8"] == 2
        assert found["Interpolate", "int8"] == 1
    else:
        names = ("ADD", "CONCATENATION", "MAX_POOL_2D", "RESIZE_NEAREST_NEIGHBOR")
        assert [found[name, "int8"] for name in names] == [5, 3, 2, 1]
        assert not any(found[name, "float"] for name in (*names, "LOGISTIC"))


def test_sixteen_bits_are_computed_in_float(made: Any) -> None:
    for runtime in ("onnxruntime", "openvino"):
        found = made(runtime, (8, 16), False)
        assert sum(len(values[0].unique()) > 400 for values in found.file.values()) >= 17
    whole, floating = layers(made("onnxruntime", (8, 16), False).path)
    assert whole == 0
    assert floating == sum(sum(counts) for counts in LAYERS.values())


def test_four_bits_are_stored_as_such(made: Any) -> None:
    import onnx

    tensors = onnx.load(made("onnxruntime", (4, 8), True).path).graph.initializer
    kinds = Counter(tensor.data_type for tensor in tensors if len(tensor.dims) in (2, 4))
    # All weights but that of the layer that stays in float.
    # As UINT4 where a channel reaches further to one side of zero than to the other.
    assert kinds.pop(onnx.TensorProto.FLOAT) == 1
    assert set(kinds) <= {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    assert kinds.total() == sum(counts[0] for counts in LAYERS.values())
    for tensor in tensors:
        if len(tensor.dims) in (2, 4) and tensor.data_type != onnx.TensorProto.FLOAT:
            assert len(tensor.raw_data) == -(-np.prod(tensor.dims) // 2)


@pytest.mark.parametrize("network", ["silu", "residual", "concat", "linear"])
def test_predictions_are_computed_in_integers_and_stay_off_every_grid(
    network: str, tmp_path: Path
) -> None:
    """The last layers' outputs are on no grid, and are still those of integer products: for
    onnxruntime, which has no convolution that gives floats."""
    last = {"silu": ("4",), "concat": ("out", "other")}.get(network, ("out",))
    student = quantized(toy(network, last), "onnxruntime", (8, 8))
    program, path = exported(student, "onnxruntime", tmp_path, (8, 8))
    found = operations(path)
    assert found["MatMulIntegerToFloat", "int8"] == len(last)
    assert not any(found[name, "float"] for name in ("Conv", "Gemm", "MatMul", "FusedConv"))
    image = images(1, seed=3)
    for given, wanted in zip(
        open_file(path).run(image.numpy()).values(), program.module()(image), strict=True
    ):
        assert len(np.unique(given)) > 1000
        assert np.abs(given - wanted.detach().numpy()).max() <= step_of(wanted)


@pytest.mark.parametrize("runtime", ["onnxruntime", "litert"])
def test_a_layer_in_float_between_grids_keeps_its_weights(runtime: str, tmp_path: Path) -> None:
    """Runtimes quantize by themselves what stands between two grids."""
    student = quantized(toy("relu"), runtime, (8, 8), overrides=(("2", "float"),))
    program, path = exported(student, runtime, tmp_path, (8, 8))
    assert layers(path) == (2, 1)
    image = images(1, seed=3)
    (given,) = open_file(path).run(image.numpy()).values()
    wanted = program.module()(image)[0].detach().numpy()
    assert (np.abs(given - wanted) > 1e-5).mean() < 0.002


class Levels(nn.Module):
    """Two layers side by side in one prediction, one of which reaches much further."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU()
        self.near, self.far = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.far.weight *= 30

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return torch.cat([self.near(x).flatten(2), self.far(x).flatten(2)], dim=2)


def test_predictions_on_several_grids_are_concatenated_in_float(tmp_path: Path) -> None:
    """LiteRT's converter would put all of them on one grid."""
    torch.manual_seed(1)
    student = quantized(Toy(Levels(), ("near", "far")), "litert", (8, 8))
    program, path = exported(student, "litert", tmp_path, (8, 8))
    assert operations(path)["CONCATENATION", "int8"] == 0
    image = images(1, seed=3)
    (given,) = open_file(path).run(image.numpy()).values()
    (wanted,) = run_in_integers(program, image, "litert").values()
    assert np.abs(given - wanted.numpy()).max() < 1e-5


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "litert"])
@pytest.mark.parametrize("channels", [slice(None), slice(2)])
def test_channels_that_vanish_are_computed_all_the_same(
    channels: slice, runtime: str, tmp_path: Path
) -> None:
    """As in networks with random weights, and in trained ones single channels do: steps are finer
    than kernels can multiply, and biases have more of them than 32 bits hold."""
    detector = toy("silu")
    with torch.no_grad():
        detector.module[2].weight[channels] *= 1e-12
        if channels.stop is None:
            detector.module[2].bias *= 1e-12
    student = quantized(detector, runtime, (8, 8))
    program, path = exported(student, runtime, tmp_path, (8, 8))
    image = images(1, seed=3)
    with torch.no_grad():
        wanted = program.module()(image)[0]
        trained = student.raw(image)
    (given,) = open_file(path, threads=1).run(image.numpy()).values()
    assert wanted.abs().max() > 0.1
    for found in (given, trained.numpy()):
        assert np.abs(found - wanted.numpy()).max() <= 1.05 * step_of(wanted)


class Rectified(nn.Module):
    """A sum behind which a ReLU stands, as at the end of a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.out = nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(self.act(x + self.conv(x)))


def test_a_sum_and_the_relu_behind_it_are_one_kernel(tmp_path: Path) -> None:
    """Half of the sums lie half-way between two integers here, and LiteRT rounds those up."""
    torch.manual_seed(1)
    student = quantized(Toy(Rectified()), "litert", (8, 8))
    grids = {
        name: quantizer
        for name, quantizer in output_quantizers(student.module)
        if not name.startswith("out.")
    }
    step = max(quantizer.log_scale.exp().max() for quantizer in grids.values())
    for name, quantizer in grids.items():
        quantizer.initialise(step.reshape(1) * (1 if name.endswith("output_quantizer") else 2))
    program, path = exported(student, "litert", tmp_path, (8, 8))
    image = images(1, seed=3)
    (wanted,) = run_in_integers(program, image, "litert").values()
    (given,) = open_file(path, threads=1).run(image.numpy()).values()
    assert np.abs(given - wanted.numpy()).max() < 1e-5


def test_a_sum_that_litert_cannot_add_is_refused(tmp_path: Path) -> None:
    student = quantized(toy("residual"), "litert", (8, 8))
    exported(student, "litert", tmp_path, (8, 8))
    (sum_grid,) = (q for name, q in output_quantizers(student.module) if ":add:" in name)
    sum_grid.initialise(torch.tensor([1e-9]))
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match=r"LiteRT cannot compute the sum .*trained weights"):
        exported(student, "litert", tmp_path / "again", (8, 8))
    assert not list((tmp_path / "again").iterdir())


def test_onnxruntime_rounds_once_between_a_factor_and_a_sum() -> None:
    """Here a sum lies so near to a half that rounding twice takes the wrong side of it."""
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime import InferenceSession

    scales, zeros = (0.07074544578790665, 0.046219710260629654, 0.09130670130252838), (12, 6, 12)
    values = np.arange(256, dtype=np.uint8)
    a, b = (side.reshape(1, 4, -1) for side in np.meshgrid(values, values))
    names = ["a", "a scale", "a zero", "b", "b scale", "b zero", "c scale", "c zero"]
    node = helper.make_node("QLinearAdd", names, ["c"], domain="com.microsoft")
    constants = [
        numpy_helper.from_array(np.array(value, kind), f"{name} {what}")
        for what, found, kind in (("scale", scales, np.float32), ("zero", zeros, np.uint8))
        for name, value in zip("abc", found, strict=True)
    ]
    made = [helper.make_tensor_value_info(name, TensorProto.UINT8, a.shape) for name in "abc"]
    graph = helper.make_graph([node], "sum", made[:2], made[2:], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {"a": a, "b": b})
    left, right = (
        OnGrid(torch.from_numpy(x).double(), torch.tensor(scale), zero, 0, 255)
        for x, scale, zero in zip((a, b), scales, zeros, strict=False)
    )
    wanted = OnnxRuntimeKernels().add(left, right, (scales[2], zeros[2], 0, 255, torch.uint8))
    assert np.array_equal(given, wanted.numpy())

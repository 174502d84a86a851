"""OpenVINO's arithmetic, done once more: equal to the last bit, on values enough for a sum to lie
next to a half now and then."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pytest
import torch
from support.toys import Pyramid, Toy, exported, quantized, several
from torch import Tensor, nn

from dfq.api.export import describe_export
from dfq.export.dependencies import compile_openvino
from dfq.export.integer import run_in_integers
from dfq.export.kernels_openvino import OpenVinoKernels, Unquantized, sigmoid
from dfq.export.on_grid import Grid, OnGrid
from dfq.export.opening import open_file
from dfq.export.program import Program, build
from dfq.export.writers import write
from dfq.quantization.policy import Policy

# Files of the runtime, which take their time.
pytestmark = pytest.mark.e2e

NETWORKS = ("residual", "residual relu", "pooled")
LARGE = 96


class Made(NamedTuple):
    program: Program
    path: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    student = quantized(several(NETWORKS), "openvino", (8, 8))
    program = build(student, "openvino", image_size=LARGE)
    policy = Policy(8, 8, "same", placement="qdq", runtime="openvino")
    info = describe_export(student, policy, "openvino", "openvino", LARGE, 1, None)
    path = tmp_path_factory.mktemp("made") / "x.xml"
    write(program, info, path)
    return Made(program, path)


def noise(count: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(count, 3, side, side, generator=generator)


def require_equal(program: Program, path: Path) -> None:
    file = open_file(path, threads=1)
    for image in noise(2, LARGE).split(1):
        wanted = run_in_integers(program, image, "openvino")
        outputs = file.run(image.numpy())
        assert outputs.keys() == wanted.keys()
        for name, values in wanted.items():
            assert np.array_equal(outputs[name], values.numpy())


def test_layers_sums_and_concatenations_are_equal_to_the_bit(made: Made) -> None:
    require_equal(*made)


class Sums(nn.Module):
    """Sums of a layer that is computed first and of what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(6))
        self.outs = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(6))
        self.up, self.pyramid = nn.Upsample(scale_factor=2), Pyramid()

    def forward(self, x: Tensor) -> list[Any]:
        levels = self.pyramid(x)
        x = self.act(self.stem(x))
        first, second, third, fourth, fifth = (layer(x) for layer in self.layers[:5])
        coarse = self.up(self.act(self.down(x)))
        sums = [
            # Of what others read as well, with an activation function on either side, of layers.
            *(first + coarse, self.act(second) + coarse, (third + coarse).relu()),
            *(fourth + self.layers[5](x), coarse, fifth + coarse.mean((2, 3), keepdim=True)),
        ]
        return [levels, [out(total) for out, total in zip(self.outs, sums, strict=False)]]


def test_sums_in_the_layer_that_gives_an_operand_are_too(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        detector = Toy(Sums())
    detector.image_size = LARGE
    student = quantized(detector, "openvino", (8, 8))
    require_equal(*exported(student, "openvino", tmp_path, (8, 8)))


def compiled(inputs: list[Any], outputs: list[Any]) -> Any:
    import openvino

    return compile_openvino(openvino.Core(), openvino.Model(outputs, inputs))


def on_grid(value: Any, grid: Grid) -> Any:
    from openvino import opset13 as op

    scale = np.float32(grid[0])
    ends = [np.full((1, 1, 1, 1), scale * np.float32(end - grid[1])) for end in grid[2:4]]
    return op.fake_quantize(value, *map(op.constant, (*ends, *ends)), 256)


def layer(value: Any, weight: np.ndarray, scale: float) -> Any:
    from openvino import opset13 as op

    scales = np.full((len(weight), 1, 1, 1), scale, np.float32)
    weights = op.multiply(op.convert(op.constant(weight), "f32"), op.constant(scales))
    return op.convolution(value, weights, [1, 1], [0, 0], [0, 0], [1, 1])


class Activated:
    """A layer and SiLU behind it, in OpenVINO and done once more."""

    grid: Grid = (0.061305128037929535, 5, 0, 255, torch.uint8)

    def __init__(self, side: int, scale: float) -> None:
        from openvino import opset13 as op

        generator, kernels = np.random.default_rng(1), OpenVinoKernels()
        weight = generator.integers(-127, 128, (8, 8, 1, 1)).astype(np.int8)
        bias = generator.uniform(-0.1, 0.1, (1, 8, 1, 1)).astype(np.float32)
        self.parameter = op.parameter([1, 8, side, side], np.float32)
        self.on_grid = on_grid(self.parameter, self.grid)
        self.node = op.swish(op.add(layer(self.on_grid, weight, scale), op.constant(bias)))
        self.images = generator.uniform(-0.3, 15.3, (1, 8, side, side)).astype(np.float32)

        integers = kernels.quantize(torch.from_numpy(self.images), self.grid)
        step = kernels.scale(self.grid)
        self.input = OnGrid(integers, step, *self.grid[1:4], grid=self.grid)
        sums = torch.nn.functional.conv2d(
            integers - self.grid[1], torch.from_numpy(weight).double()
        )
        self.before = kernels.layer(sums, step * torch.tensor(scale), torch.from_numpy(bias))
        self.values = kernels.silu(self.before)


def test_silu_is_that_of_its_convolutions() -> None:
    made = Activated(100, 0.002)
    found = compiled([made.parameter], [made.node])([made.images])[0]
    assert np.array_equal(found, made.values)
    # A function of its own: PyTorch's is another in the last bits.
    assert (torch.nn.functional.silu(made.before).numpy() != found).any()
    assert ((sigmoid(made.before) - made.before.double().sigmoid()).abs() <= 2e-7).all()


def test_a_sum_is_computed_in_steps_of_what_is_added() -> None:
    """With a zero point that OpenVINO does not round: here it is 5.0000005."""
    from openvino import opset13 as op

    made, kernels = Activated(500, 0.001), OpenVinoKernels()
    result: Grid = (0.08121661841869354, 7, 0, 255, torch.uint8)
    total = on_grid(op.add(made.on_grid, made.node), result)
    # A layer that changes nothing: what is on a grid shows behind it as it is.
    output = layer(total, np.eye(8, dtype=np.int8).reshape(8, 8, 1, 1), 1.0)
    found = compiled([made.parameter], [output])([made.images])[0]
    wanted = kernels.add(made.input, made.values, result)
    assert np.array_equal(np.round(found / kernels.scale(result).numpy()) + result[1], wanted)


def test_what_is_concatenated_is_put_on_its_grid_once(made: Made) -> None:
    """By the layers that give it: nothing but the image is quantized by an operation of its own."""
    import openvino

    model = openvino.Core().read_model(str(made.path))
    graph = compile_openvino(openvino.Core(), model).get_runtime_model()
    quantizing = []
    for node in graph.get_ordered_ops():
        info = {key: getattr(value, "value", value) for key, value in node.get_rt_info().items()}
        gives, runs = info.get("outputPrecisions"), info.get("runtimePrecision")
        if gives == "u8" and runs == "f32":
            quantizing.append(str(info["originalLayersNames"]))
    assert len(quantizing) == 1


NONE: frozenset[int] = frozenset()

Other = Literal["grid", "grid read twice", "channel", "float", "layer"]


class Summed:
    """A layer on a grid, and the sum with something else on another, in OpenVINO and done once
    more."""

    grids: tuple[Grid, ...] = (
        *((0.0613, 5, 0, 255, torch.uint8), (0.0467, 140, 0, 255, torch.uint8)),
        *((0.0783, 153, 0, 255, torch.uint8), (0.1042, 148, 0, 255, torch.uint8)),
    )
    """Of the layer's input, of its output, of what is added, and of the sum."""

    def __init__(
        self,
        other: Other,
        *,
        swish: bool,
        bias: bool,
        relu: bool = False,
        signed: frozenset[int] = NONE,
        activated: bool = False,
    ) -> None:
        from openvino import opset13 as op

        kernels = OpenVinoKernels()
        shape, generator = (1, 8, 400, 400), np.random.default_rng(1)
        beside_shape = (1, 8, 1, 1) if other == "channel" else shape
        weight = generator.integers(-127, 128, (8, 8, 1, 1)).astype(np.int8)
        added = generator.uniform(-0.5, 0.5, (1, 8, 1, 1)).astype(np.float32)
        images = [
            generator.uniform(-0.3, 15.3, shape).astype(np.float32),
            generator.uniform(-12, 8, beside_shape).astype(np.float32),
        ]
        of_input, first, second, of_sum = (
            (grid[0], 128, *grid[2:]) if number in signed else grid
            for number, grid in enumerate(self.grids)
        )
        one, two = op.parameter(shape, np.float32), op.parameter(beside_shape, np.float32)
        node = layer(on_grid(one, of_input), weight, 0.002)
        node = op.add(node, op.constant(added)) if bias else node
        node = on_grid(op.swish(node) if swish else node, first)
        beside = two if other == "float" else on_grid(two, second)
        if other == "layer":
            beside = op.add(layer(beside, weight[::-1].copy(), 0.002), op.constant(added))
        total = op.add(node, beside)
        total = on_grid(op.relu(total) if relu else total, of_sum)
        # Layers that change nothing.
        keeping = np.eye(8, dtype=np.int8).reshape(8, 8, 1, 1)
        last = of_input if activated else of_sum
        outputs = [layer(on_grid(op.swish(total), last) if activated else total, keeping, 1.0)]
        if other == "grid read twice":
            outputs.append(layer(beside, keeping, 1.0))
        found = compiled([one, two], outputs)(images)[0]
        self.found = np.round(found / kernels.scale(last).numpy()) + last[1]

        def quantized_input(values: np.ndarray, grid: Grid) -> OnGrid:
            integers = kernels.quantize(torch.from_numpy(values), grid)
            return OnGrid(integers, kernels.scale(grid), *grid[1:4], grid=grid)

        def convolved(x: OnGrid, weight: np.ndarray) -> tuple[Tensor, Tensor]:
            weights = torch.from_numpy(weight.copy()).double()
            sums = torch.nn.functional.conv2d(x.integers - x.zero_point, weights)
            return sums, x.scale * torch.tensor(0.002)

        sums, factor = convolved(quantized_input(images[0], of_input), weight)
        given = Unquantized(sums.float(), factor)
        if bias:
            given = Unquantized(kernels.layer(sums, factor, torch.from_numpy(added)))
        if swish:
            given = Unquantized(kernels.silu(given.values))
        integers = kernels.quantize_in_layer(given, first)
        x = OnGrid(integers, kernels.scale(first), *first[1:4], grid=first)
        beside_it: OnGrid | Tensor = torch.from_numpy(images[1])
        if other != "float":
            beside_it = quantized_input(images[1], second)
        if other == "layer":
            assert isinstance(beside_it, OnGrid)
            products, factor = convolved(beside_it, weight[::-1])
            beside_it = kernels.layer(products, factor, torch.from_numpy(added))

        def summed(unrounded: Unquantized | None) -> Tensor:
            integers = kernels.add(
                *(x, beside_it, of_sum),
                relu=relu,
                in_layer=True,
                unrounded=unrounded,
                signed=not activated,
            )
            if not activated:
                return integers
            total = OnGrid(integers, kernels.scale(of_sum), *of_sum[1:4], grid=of_sum)
            return kernels.quantize_in_layer(Unquantized(kernels.silu(total.values())), last)

        rounded, self.wanted = (summed(unrounded).numpy() for unrounded in (None, given))
        if swish or other in ("grid read twice", "channel", "layer"):
            rounded, self.wanted = self.wanted, rounded
        self.otherwise = rounded


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("swish", "bias"), [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("other", get_args(Other))
def test_a_sum_that_a_layer_gives(other: Other, swish: bool, bias: bool, relu: bool) -> None:
    """The first of its two grids is left out but for its ends, where the layer waits for what is
    added and no activation function stands in front."""
    made = Summed(other, swish=swish, bias=bias, relu=relu)
    assert np.array_equal(made.found, made.wanted)
    assert (made.otherwise != made.found).mean() > 0.02


@pytest.mark.parametrize("signed", [{1}, {2}, {3}, {1, 2, 3}], ids=str)
@pytest.mark.parametrize(("swish", "bias"), [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("other", [other for other in get_args(Other) if "twice" not in other])
def test_sums_of_what_has_its_zero_point_in_the_middle(
    other: Other, swish: bool, bias: bool, signed: set[int]
) -> None:
    """Such grids are of signed integers, and steps are counted from zero. (One of 100,000 values
    at most is another one, where a cause was not found.)"""
    made = Summed(other, swish=swish, bias=bias, signed=frozenset(signed))
    assert (made.found != made.wanted).mean() < 1e-5


@pytest.mark.parametrize("signed", [{1}, {3}, {1, 3}], ids=str)
def test_a_sum_of_two_layers_that_an_activation_function_reads(signed: set[int]) -> None:
    """As the two convolutions of RepConv: the activation function takes no signed integers."""
    made = Summed("layer", swish=False, bias=True, signed=frozenset(signed), activated=True)
    assert np.array_equal(made.found, made.wanted)

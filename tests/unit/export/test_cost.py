"""What small networks cost, by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor, nn

import dfq
from dfq.errors import UserError
from dfq.export.activations import watch_activations
from dfq.export.cost import Cost, FileCost, detector_cost, mac_energy, weight_memory
from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Boundary
from dfq.models.yolov5.detector import YOLOv5
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.traversal import quantized_layers

SIDE = 8
PIXELS = SIDE * SIDE
IMAGE = 3 * PIXELS
WIDE = 4 * PIXELS
"""Numbers of an activation of four channels."""


class Small(YOLOv5):
    """The few parts of the protocol that conversion and listing ask for, around any module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()
        self.names, self.image_size, self.stride, self.source = ["a"], SIDE, 4, "small"

    def raw(self, images: Tensor) -> list[Tensor]:
        return [self.module(images)]

    def boundary_layers(self) -> Boundary:
        return Boundary(("stem",), ("last",))


class Branches(nn.Module):
    """A stem, two branches, their sum, a pooling, a concatenation and a last layer."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem, self.activation = nn.Conv2d(3, 4, 1), activation
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem(x))
        x = self.pool(self.left(x) + self.right(x))
        return self.last(torch.cat([x, x.flip(1)[:, :4]], dim=1))


def branches(activation: nn.Module | None = None) -> Small:
    torch.manual_seed(0)
    return Small(Branches(activation or nn.ReLU()))


def quantized(detector: Small, bits: int = 8, activation_bits: int = 8) -> Small:
    insert_quantizers(detector, Policy(bits, activation_bits, first_last_bits="same"))
    calibrate(detector, [blobs(1)[..., :SIDE, :SIDE]], search="minmax")
    return detector


def peak_bytes(module: nn.Module) -> int:
    """Of a module in float, at its peak."""
    return max(watch_activations(Small(module.eval()), SIDE).alive())


# ---- what activations take


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.Identity()])
def test_activations_by_hand(activation: nn.Module) -> None:
    found = detector_cost(branches(activation), SIDE)
    numbers = {
        "stem": IMAGE + WIDE,
        "left": 2 * WIDE,
        # What the stem gave is still read, and what the left branch gave waits.
        "right": 3 * WIDE,
        # The concatenation, and what the network gives; a quarter of the places.
        "last": (8 + 2) * PIXELS // 4,
    }
    assert {row.name: row.figures.activation_bytes for row in found.layers} == {
        name: 4 * count for name, count in numbers.items()
    }
    assert found.total.activation_bytes == 4 * 3 * WIDE
    assert found.peak_at == "right"
    assert found.total == found.as_float


def test_activations_take_their_bits_where_all_that_reads_them_is_quantized() -> None:
    found = detector_cost(quantized(branches()), SIDE)
    # The image and what both branches read are kept in 8 bits; the branches are added in float.
    assert {row.name: row.figures.activation_bytes for row in found.layers} == {
        "stem": IMAGE + WIDE,
        "left": WIDE + 4 * WIDE,
        "right": WIDE + 2 * 4 * WIDE,
        "last": 8 * PIXELS // 4 + 4 * 2 * PIXELS // 4,
    }
    # The sum: both branches and what it gives.
    assert found.total.activation_bytes == 3 * 4 * WIDE
    assert found.as_float.activation_bytes == 3 * 4 * WIDE


def test_activations_below_8_bits() -> None:
    found = {row.name: row for row in detector_cost(quantized(branches(), 8, 3), SIDE).layers}
    assert found["stem"].figures.activation_bytes == (IMAGE + WIDE) * 3 // 8


def test_a_tensor_that_is_read_on_two_grids_is_kept_on_both() -> None:
    detector = quantized(branches())
    layers = dict(quantized_layers(detector.module))
    with torch.no_grad():
        layers["right"].input_quantizer.log_scale.add_(0.1)
    found = {row.name: row for row in detector_cost(detector, SIDE).layers}
    assert found["left"].figures.activation_bytes == 2 * WIDE + 4 * WIDE


def test_a_network_that_is_quantized_everywhere_takes_a_quarter() -> None:
    detector = insert_quantizers(fold(tiny_detector()), Policy(8, 8, placement="everywhere"))
    calibrate(detector, [blobs(2)], search="minmax")
    watched = watch_activations(detector, detector.image_size)
    low, high = watched.alive(), watched.alive(as_float=True)
    # The largest: the image and what the first convolution gives.
    assert max(low) == 3 * 64 * 64 + 8 * 32 * 32
    assert max(high) == 4 * max(low)
    # All but the predictions are on grids.
    # What pooling and enlarging choose from is on a grid, and so is what they give.
    first = next(step for step, place in enumerate(watched.places) if "model.9" in place)
    assert first > 40
    assert [4 * size for size in low[:first]] == high[:first]


def test_a_network_in_float_takes_as_much_folded_or_not() -> None:
    plain, folded = tiny_detector(), fold(tiny_detector())
    for side in (64, 128):
        bytes_of = [max(watch_activations(one, side).alive()) for one in (plain, folded)]
        assert bytes_of[0] == bytes_of[1] == 4 * (3 * side**2 + 8 * (side // 2) ** 2)


class Function(nn.Module):
    """A function of what one convolution gives, of four channels."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.function = nn.Conv2d(3, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.stem(x))


def added_in_place(x: Tensor) -> Tensor:
    other = torch.flip(x, (1,))
    x += other
    return torch.flip(x, (1,))


@pytest.mark.parametrize(
    ("function", "numbers"),
    [
        # One tensor all along.
        (torch.sigmoid, IMAGE + WIDE),
        (lambda x: torch.relu_(x * 2.0 - 1.0), IMAGE + WIDE),
        (lambda x: x.flatten(2).mT[:, 3:].mT, IMAGE + WIDE),
        # Read twice: it stays beside its sigmoid, and their product beside both.
        (lambda x: x * torch.sigmoid(x), 3 * WIDE),
        # Softmax is no function of single values.
        (lambda x: x.softmax(1), 2 * WIDE),
        # Into the first operand.
        (added_in_place, 2 * WIDE),
        # What nothing reads is not there, constants are no activations.
        (lambda x: (torch.flip(x, (1,)), torch.ones(10**6) * 2, x)[2], IMAGE + WIDE),
        # A slice keeps all that it is cut from: the first is there until the last one is read.
        (
            lambda x: torch.cat([torch.flip(x[:, :1], (2,)), x[:, 1:]], dim=1),
            WIDE + PIXELS + WIDE,
        ),
    ],
)
def test_functions_between_layers(function: Callable[[Tensor], Tensor], numbers: int) -> None:
    assert peak_bytes(Function(function)) == 4 * max(numbers, IMAGE + WIDE)


def test_what_a_network_gives_is_there_until_its_end() -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3, 4, 1) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            return [layer(x) for layer in self.layers]  # type: ignore[return-value]

    assert peak_bytes(Outputs()) == 4 * (IMAGE + 3 * WIDE)


def test_nothing_is_left_behind() -> None:
    detector = quantized(branches())
    detector_cost(detector, SIDE)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in detector.module.modules()
    )


# ---- operations, bytes and energy


def test_operations_and_bytes_by_hand() -> None:
    found = detector_cost(quantized(branches(), bits=3, activation_bits=5), SIDE)
    weights = {"stem": 12, "left": 16, "right": 16, "last": 16}
    places = {"stem": PIXELS, "left": PIXELS, "right": PIXELS, "last": PIXELS // 4}
    for row in found.layers:
        count = weights[row.name]
        assert (row.kind, row.weight_bits, row.activation_bits) == ("conv", 3, 5)
        assert row.figures.macs == count * places[row.name]
        assert row.figures.bit_operations == 3 * 5 * row.figures.macs
        assert row.figures.disk_bytes == math.ceil(count * 3 / 8)
        assert row.figures.memory_bytes == count
    # 36, 48, 48 and 48 bits.
    assert found.total.disk_bytes == 5 + 6 + 6 + 6
    assert found.total.memory_bytes == 60
    assert (found.as_float.disk_bytes, found.as_float.memory_bytes) == (240, 240)
    assert found.as_float.macs == found.total.macs == (12 + 16 + 16) * PIXELS + 16 * PIXELS // 4
    assert found.as_float.bit_operations == 32 * 32 * found.total.macs
    ratio = found.total.ratio(found.as_float)
    assert ratio["bit_operations"] == 15 / 1024
    assert ratio["memory_bytes"] == 0.25
    assert ratio["macs"] == 1


def test_a_layer_that_stays_in_float() -> None:
    detector = branches()
    insert_quantizers(detector, Policy(4, 8, overrides=(("left", "float"),)))
    calibrate(detector, [blobs(1)[..., :SIDE, :SIDE]], search="minmax")
    rows = {row.name: row.figures for row in detector_cost(detector, SIDE).layers}
    assert (rows["left"].disk_bytes, rows["left"].memory_bytes) == (64, 64)
    assert (rows["right"].disk_bytes, rows["right"].memory_bytes) == (8, 16)
    assert rows["left"].bit_operations == 1024 * 16 * PIXELS
    # It reads in float what the other branch reads in 8 bits.
    assert rows["left"].activation_bytes == 4 * 2 * WIDE


def test_energy_of_operations() -> None:
    # Horowitz's own, an integer's sum being of 32 bits.
    assert mac_energy(8, 8) == pytest.approx(0.2 + 0.1)
    assert mac_energy(32, 32) == pytest.approx(3.7 + 0.9)
    # Half of the cells, a quarter, and those of 2 x 3 bits.
    assert mac_energy(4, 8) == pytest.approx(0.1 + 0.1)
    assert mac_energy(4, 4) == pytest.approx(0.05 + 0.1)
    assert mac_energy(2, 3) == pytest.approx(0.2 * 6 / 64 + 0.1)
    # What is in float on one side is computed in float.
    assert mac_energy(8, 32) == mac_energy(32, 32)
    assert [weight_memory(10, bits) for bits in (2, 8, 32)] == [10, 10, 40]


def test_energy_by_hand() -> None:
    found = detector_cost(quantized(branches()), SIDE)
    stem = found.layers[0]
    macs = 12 * PIXELS
    # 8-bit weights, image and output.
    moved = 8 * (12 + IMAGE + WIDE)
    expected = macs * (0.3 + 16 / 32 * 5) + moved / 32 * 640
    assert stem.figures.energy_joules == pytest.approx(expected * 1e-12)
    in_float = detector_cost(branches(), SIDE).layers[0].figures
    expected = macs * (4.6 + 64 / 32 * 5) + 4 * moved / 32 * 640
    assert in_float.energy_joules == pytest.approx(expected * 1e-12)
    assert found.total.energy_joules < found.as_float.energy_joules
    total = sum(row.figures.energy_joules for row in found.layers)
    assert found.total.energy_joules == pytest.approx(total)


def test_fewer_bits_cost_less() -> None:
    found = [detector_cost(quantized(branches(), bits, bits), SIDE).total for bits in range(2, 9)]
    for less, more in itertools.pairwise(found):
        assert less.energy_joules < more.energy_joules
        assert less.bit_operations < more.bit_operations
        assert less.disk_bytes < more.disk_bytes
        assert less.memory_bytes == more.memory_bytes


class Attending(nn.Module):
    """What is no convolution: PyTorch's own attention, which stays in float, and its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).mT
        return self.last(self.attend(tokens, tokens, tokens)[0])


def test_weights_of_attention_count() -> None:
    rows = {row.name: row for row in detector_cost(Small(Attending()), SIDE).layers}
    # Projections of queries, keys and values, and of the output.
    assert rows["attend"].figures.disk_bytes == 4 * (3 * 16 + 16)
    assert rows["attend"].kind == "attention"
    assert rows["last"].figures.macs == 4 * 4 * 5


# ---- what it is asked of


def test_of_a_model_and_an_image_size(tmp_path: Path) -> None:
    detector = tiny_detector()
    own, larger = dfq.cost(detector), dfq.cost(detector, image_size=128)
    assert isinstance(own, Cost)
    assert isinstance(larger, Cost)
    assert (own.image_size, larger.image_size) == (64, 128)
    assert larger.total.macs == 4 * own.total.macs
    assert larger.total.disk_bytes == own.total.disk_bytes
    assert own.to_dict()["layers"][0]["name"] == "model.0.conv"
    with pytest.raises(UserError, match="'image_size': 100 is no multiple of the model's stride"):
        dfq.cost(detector, image_size=100)


def test_of_an_exported_file(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.write_bytes(b"x" * 1234)
    assert dfq.cost(file) == FileCost(str(file), 1234)
    # OpenVINO's is two.
    graph = tmp_path / "b.xml"
    graph.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"b\.bin: there is no such file"):
        dfq.cost(graph)
    graph.with_suffix(".bin").write_bytes(b"x" * 1000)
    assert dfq.cost(graph) == FileCost(str(graph), 1100)


def test_of_an_exported_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty.tflite").touch()
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "a.onnx").write_bytes(b"x")
    for name, message in (
        ("none.onnx", "there is no such file"),
        ("empty.tflite", "is empty"),
        ("folder.pt2", "there is no such file"),
    ):
        with pytest.raises(UserError, match=message):
            dfq.cost(tmp_path / name)
    with pytest.raises(UserError, match=r"'image_size' 64: .*is an exported file"):
        dfq.cost(tmp_path / "a.onnx", image_size=64)

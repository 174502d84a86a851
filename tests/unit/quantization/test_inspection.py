"""What each layer costs, by hand, and the sums over layers."""

from __future__ import annotations

import pytest
from support.listing_parts import FIRST, LAST, SharedDetector
from support.tiny_detector import SIDE, tiny_detector
from torch import Tensor, nn

from dfq.graph.fold_batchnorm import fold
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.inspection import LayerInfo, bit_operations, list_layers, quantized_share
from dfq.quantization.policy import Policy


def test_macs_of_linear_and_shared_layers() -> None:
    rows = {row.name: row for row in list_layers(SharedDetector())}
    assert list(rows) == ["stem", "levels.0.0", "token"]
    assert rows["stem"].macs == 14 * 14 * 4 * 3 * 3 * 3
    # Both calls count: 14 x 14 and 7 x 7 places.
    assert rows["levels.0.0"].macs == (14 * 14 + 7 * 7) * 4 * 4
    assert rows["token"].macs == 2 * 4 * 5
    assert rows["token"].kind == "linear"
    assert rows["token"].output_shape == (2, 5)


class Mixed(nn.Module):
    """What cannot be quantized between two layers that can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.enlarge = nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.token = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.enlarge(self.stem(x)).flatten(2).mT
        return self.token(self.attend(tokens[:, :3], key=tokens, value=tokens)[0])


def test_what_stays_in_float_counts_all_the_same() -> None:
    detector = SharedDetector()
    detector.module = Mixed().eval()
    insert_quantizers(detector, Policy(weight_bits=8))
    rows = list_layers(detector, 8)
    kinds = {row.name: (row.kind, row.quantized) for row in rows}
    assert kinds == {
        "stem": ("conv", True),
        "enlarge": ("deconv", False),
        "attend": ("attention", False),
        "token": ("linear", True),
    }
    # Each of 8 x 8 inputs of 4 channels gives 4 x 4 outputs of 6.
    enlarging = 8 * 8 * 4 * 16 * 6
    # 3 queries and outputs, 256 keys and values, all of 6 channels; two products.
    attending = 2 * 3 * 6 * 6 + 2 * 256 * 6 * 6 + 2 * 3 * 256 * 6
    assert [row.macs for row in rows] == [8 * 8 * 3 * 4, enlarging, attending, 3 * 6 * 5]
    total = sum(row.macs for row in rows)
    assert quantized_share(rows) == (8 * 8 * 3 * 4 + 3 * 6 * 5) / total


def test_macs_by_hand() -> None:
    """(output side)^2 * outputs * inputs * kernel^2 of each layer, from the description."""
    detector, half = fold(tiny_detector()), SIDE // 2
    expected = {
        "model.0.conv": half**2 * 8 * 3 * 9,
        "model.1.conv": (half // 2) ** 2 * 16 * 8 * 9,
        "model.2.conv": (half // 4) ** 2 * 16 * 16 * 9,
        "model.4.conv": (half // 8) ** 2 * 32 * 16 * 9,
        "model.5.cv1.conv": (half // 8) ** 2 * 32 * 16,
        "model.5.cv2.conv": (half // 8) ** 2 * 64 * 32,
        "model.9.m.0": (half // 4) ** 2 * 16 * 16,
        "model.9.m.1": (half // 8) ** 2 * 32 * 16,
    }
    for block, inputs in (("model.3", 16), ("model.8", 48)):
        places = (half // 4) ** 2
        expected |= {
            f"{block}.cv1.conv": places * inputs * 8,
            f"{block}.cv2.conv": places * inputs * 8,
            f"{block}.m.0.cv1.conv": places * 8 * 8,
            f"{block}.m.0.cv2.conv": places * 8 * 8 * 9,
            f"{block}.cv3.conv": places * 16 * 16,
        }
    rows = list_layers(detector)
    assert {row.name: row.macs for row in rows} == expected
    assert rows[0].name == FIRST
    assert {rows[-1].name, rows[-2].name} == set(LAST)
    assert rows[0].weight_shape == (8, 3, 3, 3)
    assert rows[0].output_shape == (8, half, half)
    twice = list_layers(detector, 2 * SIDE)
    assert [row.macs for row in twice] == [4 * row.macs for row in rows]
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in detector.module.modules()
    )


def row(name: str, macs: int, weights: int, activations: int) -> LayerInfo:
    return LayerInfo(name, "conv", (1,), (1,), macs, weights, activations)


def test_share_and_bit_operations_by_hand() -> None:
    rows = [row("a", 100, 4, 8), row("b", 50, 32, 32), row("c", 50, 8, 8)]
    assert quantized_share(rows) == 150 / 200
    assert bit_operations(rows) == 100 * 4 * 8 + 50 * 32 * 32 + 50 * 8 * 8
    assert quantized_share([]) == 0
    assert [r.to_dict()["quantized"] for r in rows] == [True, False, True]


def test_share_of_a_detector() -> None:
    detector = fold(tiny_detector())
    assert quantized_share(list_layers(detector)) == 0
    insert_quantizers(detector, Policy(first_last_bits="float"))
    rows = {r.name: r for r in list_layers(detector)}
    edge = sum(rows[name].macs for name in (FIRST, *LAST))
    total = sum(r.macs for r in rows.values())
    assert quantized_share(rows.values()) == pytest.approx(1 - edge / total)

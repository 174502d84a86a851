"""What calibration, rounding and reconstruction are expected to take: layer by layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_detector import SIDE, blobs, tiny_detector

from dfq.graph.fold_batchnorm import fold
from dfq.graph.outline import outline
from dfq.ptq.expected import (
    calibration_seconds,
    ranges_seconds,
    reconstruction_seconds,
    rounding_seconds,
)
from dfq.ptq.gptq import SAMPLES
from dfq.ptq.rates import LayerWork, Rates, Stopwatch, measure_rates
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.settings import Quantization
from dfq.quantization.traversal import quantized_layers

NOTHING = Rates(
    layers=[],
    activations={},
    last=0,
    tail=0.0,
    forward=1.0,
    student=2.0,
    rounding=1.0,
    observed=0.0,
    divergence=0.0,
    activation=0.0,
    weight=0.0,
    gather=0.0,
    column=0.0,
    element=0.0,
    product=0.0,
)


def layer(name: str, outputs: int = 8, inputs: int = 16, reached: float = 0.0) -> LayerWork:
    return LayerWork(name, 1, outputs, inputs, grids=8, places=100, reached=reached)


def test_rounding_takes_outputs_times_the_square_of_inputs() -> None:
    rates = replace(
        NOTHING,
        layers=[layer("a"), layer("b", outputs=80), layer("c", outputs=8000), layer("d", 8000, 32)],
        rounding=0.0,
        forward=0.0,
        product=1e-9,
    )
    _, b, c, d = rounding_seconds(rates, [], count=4)
    assert d / c == pytest.approx(4, rel=0.01)
    assert c / b == pytest.approx(100, rel=0.05)


def test_what_a_layer_reads_is_gathered_from_so_many_samples() -> None:
    rates = replace(NOTHING, layers=[layer("a"), layer("b", 8, 32)], forward=0.0, gather=1e-3)
    # 4 images of 100 places; and of many images no more than a limit.
    assert rounding_seconds(rates, [], 4) == pytest.approx([400 * 16e-3, 400 * 32e-3])
    assert rounding_seconds(rates, [], 10**6)[1] == pytest.approx(SAMPLES * 32e-3)
    wide = replace(rates, layers=[replace(layer("a"), wide=True)])
    assert rounding_seconds(wide, [], 4) == [0.0]


def test_images_run_from_the_last_block_that_is_done() -> None:
    layers = [
        layer("0.a", reached=0.1), layer("0.b", reached=0.3),
        layer("1.a", reached=0.6), layer("1.b", reached=0.9),
    ]  # fmt: skip
    rates = replace(NOTHING, layers=layers, forward=1.0, rounding=1.5)
    # Two networks, the quantized one 1.5 times as slow; the first layer runs all once for each.
    both = 10 * 2.5
    expected = [0.1 + 1.0, 0.3 + 0.6, 0.0, 0.3 + 0.4]
    assert rounding_seconds(rates, ["0", "1"], 10) == pytest.approx([both * s for s in expected])
    # Nothing is kept: each layer is run to from the start.
    expected = [0.1 + 1.0, 0.3, 0.6, 0.9]
    assert rounding_seconds(rates, [], 10) == pytest.approx([both * s for s in expected])


def test_ranges_cost_what_comes_after_them() -> None:
    rates = replace(
        NOTHING,
        layers=[layer("a", reached=0.0), layer("b", reached=0.75)],
        activations={"a": 6, "b": 6, "c": 8},
        divergence=0.05,
    )
    section = Quantization(activation_bits=6, refine_images=10)
    first, second = ranges_seconds(rates, section, 64)
    assert first / second == pytest.approx(1.05 / 0.30)
    assert ranges_seconds(rates, Quantization(refine_images=0), 64) == []
    # All three by the predictions.
    assert len(ranges_seconds(rates, Quantization(ranges="pd"), 64)) == 3


def test_calibration_searches_each_range_and_runs_the_images() -> None:
    layers = [layer("a", 4, 8), layer("b", 2, 8)]
    rates = replace(
        NOTHING, layers=layers, activations={"a": 8, "b": 8}, observed=0.5, activation=3.0,
        weight=0.25,
    )  # fmt: skip
    section = Quantization(ranges="minmax", calibration_images=10)
    assert calibration_seconds(rates, section, 6) == [6 * 0.5 + 2 * 3.0 + 48 * 0.25]
    assert calibration_seconds(rates, section, 60)[0] == 10 * 0.5 + 18.0
    few = calibration_seconds(replace(rates, last=1, divergence=1.0), Quantization(), 6)
    more = calibration_seconds(replace(rates, last=3, divergence=1.0), Quantization(), 6)
    # Twelve grids for each, on every image.
    assert more[1] - few[1] == pytest.approx(2 * 12 * 6 * 1.0)


class Ticking:
    """A clock that layers move, as far as each has MACs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_those_of_the_network_whatever_the_machine() -> None:
    teacher = fold(tiny_detector())
    student = insert_quantizers(teacher.clone(), Quantization().policy())
    macs = {row.name: row.macs for row in outline(teacher, SIDE).layers}
    clock = Ticking()

    def moves(name: str, times: float) -> object:
        def after(_m: object, inputs: tuple[torch.Tensor, ...], _o: object) -> None:
            clock.now += times * macs[name] * len(inputs[0])

        return after

    for name, _ in quantized_layers(student.module):
        teacher.module.get_submodule(name).register_forward_hook(moves(name, 1.0))
        student.module.get_submodule(name).register_forward_hook(moves(name, 3.0))
    images = (blobs(2) * 255).to(torch.uint8)
    watch = Stopwatch(teacher.device, clock)
    rates = measure_rates(student, teacher, images, Quantization(), watch)
    assert rates.forward == sum(macs.values())
    assert rates.student == 3 * rates.forward
    assert rates.rounding == 3
    before = 0
    for work in rates.layers:
        assert work.reached == before, work.name
        before += macs[work.name]
    shapes = {name: tuple(m.weight.shape) for name, m in quantized_layers(student.module)}
    assert {w.name: (w.outputs, w.inputs) for w in rates.layers} == {
        name: (shape[0], shape[1] * shape[2] * shape[3]) for name, shape in shapes.items()
    }
    # 64 px at a stride of 2.
    assert rates.layers[0].places == 32 * 32
    # All of the network is learned, however it is cut into units.
    section = Quantization(reconstruction="adaround", reconstruction_iterations=100)
    by_layer = reconstruction_seconds(rates, student, section, 32)
    section = Quantization(reconstruction="qdrop", reconstruction_iterations=100)
    by_block = reconstruction_seconds(rates, student, section, 32)
    assert len(by_layer) > len(by_block)
    assert sum(by_layer) == pytest.approx(sum(by_block), rel=0.02)
    section = Quantization(reconstruction="pd", reconstruction_iterations=100)
    assert sum(reconstruction_seconds(rates, student, section, 32)) > 2 * sum(by_block)

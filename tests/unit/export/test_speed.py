"""What is said of times: nothing is called faster that is not."""

from __future__ import annotations

import pytest

from dfq.api.speed import Speed
from dfq.export.latency import Latency


def latency(ratio: float, threads: int | None = 1) -> Latency:
    return Latency(160, threads, 10.0, 10.0 * ratio, ratio)


@pytest.mark.parametrize(("ratio", "said"), [(0.949, 0), (0.95, 1), (1.3, 1)])
def test_integers_that_gain_nothing_are_named(ratio: float, said: int) -> None:
    lines = Speed("onnxruntime", [latency(ratio)]).said()
    assert len(lines) == said
    assert all("not worth it here" in line and f"{ratio:.0%}" in line for line in lines)


def test_each_number_of_threads_has_a_say_of_its_own() -> None:
    lines = Speed("onnxruntime", [latency(0.5), latency(1.1, None)]).said()
    assert len(lines) == 1
    assert "all threads" in lines[0]


@pytest.mark.parametrize(("half", "said"), [(0.4, True), (0.6, False)])
def test_float_in_bfloat16_that_is_faster_is_named(half: float, said: bool) -> None:
    speed = Speed("openvino", [latency(0.5)], [latency(half)])
    assert any("bfloat16 is faster" in line for line in speed.said()) == said
    assert speed.to_dict()["float_in_bfloat16"][0]["ratio"] == half
    assert len(speed.table()) == 2

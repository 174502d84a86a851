"""Finished blocks answer from memory, and nobody can tell."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor, nn

from dfq.graph.fold_batchnorm import fold
from dfq.ptq.block_cache import BlockOutputCache
from dfq.ptq.gptq import gptq_quantize
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy


class Skips(nn.Module):
    """Three blocks in a row, a sum past the second, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.twice = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.a(x)
        b = self.b(a)
        b += a  # Written into: the memory must not be.
        return [self.twice(self.c(b)), self.twice(b)]


@pytest.fixture
def network() -> Skips:
    torch.manual_seed(0)
    return Skips().requires_grad_(False)


def counted(module: nn.Module) -> Counter[str]:
    """Counts what is really computed."""
    ran: Counter[str] = Counter()
    for name, child in module.named_children():
        compute = child.forward

        def forward(x: Tensor, name: str = name, compute: object = compute) -> Tensor:
            ran.update([name])
            return compute(x)  # type: ignore[operator]

        child.__class__ = type("Counted", (nn.Linear,), {"forward": lambda s, x, f=forward: f(x)})
    return ran


def test_answers_are_those_of_the_network_and_not_computed(network: Skips) -> None:
    batches = [torch.randn(2, 4), torch.randn(3, 4)]
    expected = [network(batch) for batch in batches]
    ran = counted(network)
    with BlockOutputCache(network, lambda i: network(batches[i]), 2, ["a", "b", "twice"]) as kept:
        for name in ("a", "b", "twice"):
            kept.finish(name)
        ran.clear()
        for _ in range(2):
            for number, wanted in enumerate(expected):
                torch.testing.assert_close(kept.run(number), wanted, rtol=0, atol=0)
        # What runs twice in a pass has two answers, and is computed.
        assert ran == {"c": 4, "twice": 8}
    ran.clear()
    network(batches[0])
    assert ran == {"a": 1, "b": 1, "c": 1, "twice": 2}


def test_without_room_what_is_still_looked_at_is_computed(network: Skips) -> None:
    batch = torch.randn(2, 4)
    expected = network(batch)
    ran = counted(network)
    one = 2 * 4 * 4
    names = ["a", "b", "c"]
    with BlockOutputCache(network, lambda _: network(batch), 1, names, room=2 * one) as kept:
        for name in names:
            kept.finish(name)
            torch.testing.assert_close(kept.run(0), expected, rtol=0, atol=0)
        # The third finds no room beside the first two, which are both summed up.
        ran.clear()
        kept.run(0)
        assert ran == {"c": 1, "twice": 2}


def test_without_room_what_nobody_looks_at_is_forgotten() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).requires_grad_(False)
    batch = torch.randn(2, 4)
    expected = network(batch)
    ran = counted(network)
    names = ["0", "1", "2", "3"]
    # Room for one output, and for what two forgotten ones leave.
    with BlockOutputCache(network, lambda _: network(batch), 1, names, room=2 * 4 * 4 + 16) as kept:
        for name in names[:3]:
            kept.finish(name)
            torch.testing.assert_close(kept.run(0), expected, rtol=0, atol=0)
        ran.clear()
        kept.run(0)
        assert ran == {"3": 1}


@pytest.mark.parametrize("placement", ["inputs", "everywhere"])
@pytest.mark.parametrize("room", [0, 10_000])
def test_rounding_does_not_depend_on_it(
    monkeypatch: pytest.MonkeyPatch, room: int, placement: str
) -> None:
    images = (blobs(6) * 255).to(torch.uint8)

    def rounded() -> dict[str, Tensor]:
        teacher = fold(tiny_detector().clone())
        student = insert_quantizers(teacher.clone(), Policy(4, 8, placement=placement))
        calibrate(student, [images.float() / 255])
        gptq_quantize(student, teacher, images, batch_size=2)
        return student.module.state_dict()

    with_memory = rounded()
    monkeypatch.setattr(BlockOutputCache, "of", functools.partial(BlockOutputCache.of, room=room))
    without = rounded()
    assert all(torch.equal(without[name], value) for name, value in with_memory.items())


class Views(nn.Module):
    """Two blocks; a view of what the second gives is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.a(x)
        b = self.b(a)
        b[0].mul_(2)
        return a, b


def test_only_what_is_written_into_is_copied() -> None:
    torch.manual_seed(0)
    network, batch = Views().requires_grad_(False), torch.randn(2, 4)
    expected = network(batch)
    with BlockOutputCache(network, lambda _: network(batch), 1, ["a", "b"]) as kept:
        kept.finish("a")
        kept.finish("b")
        (a, b), (again, other) = kept.run(0), kept.run(0)
    assert a is again
    assert b is not other
    torch.testing.assert_close((a, b, other), (*expected, expected[1]), rtol=0, atol=0)

"""Pixels and coarser grids: compiled and not, the same, and what they are defined as."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dfq.kernels import grids
from dfq.kernels.grids import add_doubled, halved


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(grids, "usable_planes", lambda _: False)
    return str(request.param)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("sides", [(2, 2), (2, 8), (6, 2), (34, 70)])
def test_halving_sums_blocks(way: str, sides: tuple[int, int]) -> None:
    images = drawn(2, 3, *sides)
    torch.testing.assert_close(halved(images), 4 * F.avg_pool2d(images, 2))


@pytest.mark.parametrize("sides", [(1, 1), (1, 4), (3, 1), (17, 35)])
def test_doubling_adds_a_grid_enlarged_bilinearly(way: str, sides: tuple[int, int]) -> None:
    grid = drawn(2, 3, *sides)
    out = drawn(2, 3, 2 * sides[0], 2 * sides[1])
    wanted = out + F.interpolate(grid.double(), scale_factor=2, mode="bilinear").float()
    assert add_doubled(grid, out) is out
    torch.testing.assert_close(out, wanted)


def test_what_does_not_lie_in_planes_is_taken_too(way: str) -> None:
    images = drawn(2, 3, 4, 6).contiguous(memory_format=torch.channels_last)
    assert torch.equal(halved(images), halved(images.contiguous()))
    out = drawn(2, 3, 8, 12).contiguous(memory_format=torch.channels_last)
    wanted = add_doubled(images.contiguous(), out.contiguous())
    torch.testing.assert_close(add_doubled(images, out), wanted)


@pytest.mark.parametrize("sides", [(4, 6), (32, 48)])
def test_compiled_sums_are_those_of_pytorch_to_the_bit(
    sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = drawn(3, 3, *sides)
    compiled = halved(images)
    monkeypatch.setattr(grids, "usable_planes", lambda _: False)
    assert torch.equal(compiled, halved(images))

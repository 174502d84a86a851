"""Heads that levels of a pyramid share, in files: each level has a grid, and the head another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.counting import layers, operations
from support.toys import Pyramid, Toy, exported, quantized
from torch import Tensor, nn

from dfq.export.integer import run_in_integers
from dfq.export.opening import open_file
from dfq.export.passes import QUANTIZE, grid_at
from dfq.export.program import Program

# Files of the runtimes, which take their time.
pytestmark = pytest.mark.e2e

SIDE = 32


def made(module: nn.Module, runtime: str, folder: Path) -> tuple[Program, Path]:
    """The program and the file of a network with random weights."""
    detector = Toy(module)
    detector.image_size = SIDE
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan = layer.weight[0].numel()
            layer.weight.normal_(0, (2 / fan) ** 0.5, generator=generator)
    return exported(quantized(detector, runtime, (8, 8)), runtime, folder, (8, 8))


def require_equal(program: Program, path: Path, runtime: str) -> None:
    """The file gives what the runtime's integer arithmetic gives of the program."""
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    wanted = run_in_integers(program, image, runtime)
    given = open_file(path, threads=1).run(image.numpy())
    for values, found in zip(wanted.values(), given.values(), strict=True):
        assert found.shape == values.shape
        assert np.abs(found - values.numpy()).max() < 1e-5
        assert len(np.unique(found)) > 3


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "litert"])
def test_levels_and_what_a_shared_head_makes_of_them(runtime: str, tmp_path: Path) -> None:
    program, path = made(Pyramid(), runtime, tmp_path)
    require_equal(program, path, runtime)
    if runtime == "litert":
        # Its converter leaves the second of two grids out.
        moves = [node for node in program.exported.graph.nodes if node.target is QUANTIZE]
        assert all(grid_at(node.args[0]) in (None, tuple(node.args[1:6])) for node in moves)
    # Of the head's two layers, one for each of four levels.
    assert layers(path) == (3 + 3 + 3 + 2 * 4, 0)


class Reflecting(nn.Module):
    """A head shared by two levels, in front of which rows and columns are repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, 2, padding=1)
        self.head = nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(level) for level in (self.near(x), 3 * self.far(x))]


READERS = (
    ("itself", "pooled", "layer"),
    ("itself", "enlarged", "layer"),
    ("rows", "layer"),
    ("rows", "pooled", "layer"),
    ("layer", "itself", "rows", "pooled"),
)


class Read(nn.Module):
    """A tensor with several readers, in an order."""

    def __init__(self, readers: tuple[str, ...]) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pooled, self.enlarged = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.rows, self.itself = nn.Flatten(2), nn.Identity()
        self.readers = readers

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        return [getattr(self, reader)(x) for reader in self.readers]


class SideBySide(nn.Module):
    """Networks on one image, to convert them all at once."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        return [part(x) for part in self.parts]


def test_readers_of_a_tensor_do_not_disturb_each_other_in_litert(tmp_path: Path) -> None:
    """Whichever of them needs the channels where they are, and in whatever order they come."""
    parts = (*map(Read, READERS), Reflecting())
    program, path = made(SideBySide(*parts), "litert", tmp_path)
    require_equal(program, path, "litert")
    assert layers(path) == (2 * len(READERS) + 4, 0)
    kept = ("MAX_POOL_2D", "RESIZE_NEAREST_NEIGHBOR")
    assert not any(operations(path)[name, "float"] for name in kept)

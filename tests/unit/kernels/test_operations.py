"""The compiled functions as operations of PyTorch: what they say of themselves is so."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from dfq.kernels.loader import usable
from dfq.kernels.operations import OPERATIONS

HAS_COMPILER = shutil.which("cc") is not None


def innermost(dtype: torch.dtype, *shape: int) -> Tensor:
    drawn = torch.randn(shape, generator=Generator().manual_seed(len(shape)))
    return drawn.to(dtype).contiguous(memory_format=torch.channels_last)


def arguments(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What an operation can be called with."""
    x, grad = innermost(dtype, 2, 16, 3, 5), innermost(dtype, 2, 16, 3, 5)
    expected, mean, var = torch.zeros(3, 16).unbind(0)
    pixels, view = innermost(torch.float32, 2, 3, 4, 6).contiguous(), innermost(dtype, 2, 3, 4, 6)
    flipped = torch.tensor([True, False])
    erased = torch.tensor([[1, 3, 2, 5], [0, -1, 0, 2]], dtype=torch.int32)
    slope, offset = torch.arange(32.0).view(2, 16).unbind(0)
    return {
        "moments": (x, expected, mean, var),
        "silu_and_moments": (x, torch.empty_like(x), expected, mean, var),
        "add_linear": (x, grad, torch.empty_like(x), slope, offset),
        "silu_backward": (x, grad, torch.empty_like(x), slope, offset),
        "view": (pixels, view, flipped, erased),
        "view_backward": (view, torch.zeros(2, 3, 4, 6), flipped, erased),
        "variation": (pixels, torch.zeros_like(pixels), torch.zeros(2, 2, dtype=torch.float64)),
        "halved": (pixels, torch.empty(2, 3, 2, 3)),
        "add_doubled": (pixels, torch.zeros(2, 3, 8, 12)),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_writes_what_its_schema_says(name: str, dtype: torch.dtype) -> None:
    given = arguments(name, dtype)
    if not usable(given[0]):
        assert not HAS_COMPILER
        return
    operation = OPERATIONS[name]
    # Nothing else is written, and its stand-in of no values gives what it gives.
    torch.library.opcheck(operation, given, test_utils=("test_schema", "test_faketensor"))
    # Of outputs no value is left as it was.
    written = [a.alias_info is not None for a in operation._schema.arguments]
    for x, out in zip(given, written, strict=True):
        if out and name != "add_doubled":
            x.fill_(float("nan"))
    operation(*given)
    assert all(bool(x.isfinite().all()) for x in given)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_compiler_of_programs_takes_an_operation_for_one_step(name: str) -> None:
    given = arguments(name, torch.float32)
    if not usable(given[0]):
        assert not HAS_COMPILER
        return
    graphs: list[torch.fx.GraphModule] = []
    # So many operations are compiled here that those before would count against a limit.
    torch.compiler.reset()

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    ours, theirs = ([x.clone() for x in given] for _ in range(2))
    OPERATIONS[name](*ours)
    # In one graph: whatever it could not look through would be an error.
    torch.compile(OPERATIONS[name], backend=backend, fullgraph=True)(*theirs)
    (graph,) = graphs
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [OPERATIONS[name]]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)

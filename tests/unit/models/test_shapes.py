"""What operations give is foreseen: against PyTorch, operation by operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfq.models.bounded import bounded
from dfq.models.shapes import multiplications, shape_of, size_of_new

F = nn.functional
X = torch.rand(2, 6, 13, 11)
ROWS = torch.rand(2, 5, 7)


class Seen(TorchDispatchMode):
    """Compares what is foreseen of each operation with what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        pointwise = torch.Tag.pointwise in func.tags
        shape = shape_of(name, args, kwargs, pointwise=pointwise)
        new = size_of_new(name, args)
        given = func(*args, **kwargs)
        first = given[0] if isinstance(given, tuple) else given
        if shape is not None:
            assert shape == list(first.shape), name
            self.names.add(name)
        if new:
            assert new == first.numel(), name
            self.names.add(name)
        self.products += multiplications(name, args, shape)
        return given


CALLS: dict[str, Callable[[], Any]] = {
    "convolution": lambda: nn.Conv2d(6, 10, (3, 5), (2, 1), (1, 2), (1, 2), groups=2)(X),
    "convolution-same": lambda: nn.Conv2d(6, 6, 3, padding="same")(X),
    "convolution-turned": lambda: nn.ConvTranspose2d(6, 10, 3, 2, 1, 1, groups=2)(X),
    "mm": lambda: ROWS[0] @ ROWS[0].T,
    "bmm": lambda: ROWS @ ROWS.mT,
    "cat": lambda: torch.cat([X, X, X], 1),
    "cat-last": lambda: torch.cat([X, X], -1),
    "stack": lambda: torch.stack([X, X], -1),
    "upsample_nearest2d": lambda: F.interpolate(X, scale_factor=2),
    "upsample_bilinear2d": lambda: F.interpolate(X, size=(20, 30), mode="bilinear"),
    "max_pool2d_with_indices": lambda: F.max_pool2d(X, 3, 2, 1, return_indices=True),
    "max_pool2d_with_indices-up": lambda: nn.MaxPool2d(
        2, 3, 1, ceil_mode=True, return_indices=True
    )(X),
    "max_pool2d_with_indices-wide": lambda: nn.MaxPool2d(3, 1, 1, 2, return_indices=True)(X),
    "avg_pool2d": lambda: nn.AvgPool2d((3, 2), 2)(X),
    "avg_pool2d-up": lambda: nn.AvgPool2d(4, 3, 1, ceil_mode=True)(X),
    "constant_pad_nd": lambda: F.pad(X, (1, 2, -3, 4)),
    "native_batch_norm": lambda: nn.BatchNorm2d(6).eval()(X),
    "_softmax": lambda: X.softmax(1),
    "sum": lambda: X.sum((1, -1)),
    "sum-kept": lambda: X.sum((0, 2), keepdim=True),
    "silu": lambda: F.silu(X),
    "add": lambda: X + X[:, :1, :, :1],
    "mul": lambda: X * torch.rand(11),
    "empty": lambda: torch.empty(3, 4),
    "zeros": lambda: torch.zeros(3, 4),
    "full": lambda: torch.full((3, 4), 7.0),
    "arange": lambda: torch.arange(7),
    "arange-steps": lambda: torch.arange(2, 9, 3),
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_are_pytorchs(name: str) -> None:
    with torch.no_grad(), Seen() as seen:
        CALLS[name]()
    assert name.partition("-")[0] in {one.replace("_legit_no_training", "") for one in seen.names}


@pytest.mark.parametrize("name", [name for name in CALLS if "full" not in name])
def test_what_has_no_numbers_has_the_same_shape(name: str) -> None:
    def shapes(given: Any) -> Any:
        return [part.shape for part in (given if isinstance(given, tuple) else (given,))]

    expected = shapes(CALLS[name]())
    real, rows = globals()["X"], globals()["ROWS"]
    try:
        globals()["X"], globals()["ROWS"] = real.to("meta"), rows.to("meta")
        with torch.device("meta"), torch.no_grad(), bounded("x"):
            assert shapes(CALLS[name]()) == expected
    finally:
        globals()["X"], globals()["ROWS"] = real, rows


@pytest.mark.parametrize(
    ("layer", "given", "expected"),
    [
        # Each of 8 x 8 places of 10 channels takes 3 x 3 x 6 / 2 products.
        (nn.Conv2d(6, 10, 3, 1, 1, groups=2), torch.rand(1, 6, 8, 8), 8 * 8 * 10 * 9 * 3),
        # Each of 4 x 4 places of 6 channels goes into 2 x 2 places of 10.
        (nn.ConvTranspose2d(6, 10, 2, 2), torch.rand(1, 6, 4, 4), 4 * 4 * 6 * 4 * 10),
        (nn.Linear(7, 3, bias=False), torch.rand(5, 7), 5 * 7 * 3),
    ],
)
def test_multiplications(layer: nn.Module, given: Tensor, expected: int) -> None:
    with torch.no_grad(), Seen() as seen:
        layer(given)
    assert seen.products == expected
    assert math.isfinite(seen.products)

"""Activations by name and arguments: what is read, and that nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dfq.errors import UserError
from dfq.models import activations
from dfq.models.checkpoint import Inert


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("nn.SiLU()", nn.SiLU()),
        ("torch.nn.SiLU(inplace=True)", nn.SiLU()),
        ("SiLU()", nn.SiLU()),
        ("nn.LeakyReLU(0.1)", nn.LeakyReLU(0.1)),
        ("nn.LeakyReLU(0.1, True)", nn.LeakyReLU(0.1)),
        ("nn.LeakyReLU( negative_slope = 1e-1 )", nn.LeakyReLU(0.1)),
        ("nn.LeakyReLU()", nn.LeakyReLU()),
        ("nn.ReLU(True)", nn.ReLU()),
        ("nn.Hardtanh(-2, 3)", nn.Hardtanh(-2.0, 3.0)),
        ("nn.Hardtanh(max_val=3, min_val=-2)", nn.Hardtanh(-2.0, 3.0)),
        ("nn.GELU('tanh')", nn.GELU("tanh")),
        ("nn.Threshold(0.1, -2)", nn.Threshold(0.1, -2)),
        ("nn.RReLU(0.2)", nn.RReLU(0.2)),
        ("nn.Softplus(beta=2)", nn.Softplus(2)),
        ("nn.PReLU(1, 0.3)", nn.PReLU()),
    ],
)
def test_texts(text: str, module: nn.Module) -> None:
    written = activations.parse(text)
    made = activations.make(written)
    assert type(made) is type(module)
    assert not made.training
    assert activations.describe(made) == activations.describe(module) == written
    # What is written reads back, also where Python evaluates it.
    assert activations.parse(written) == written
    assert type(eval(activations.torch_text(written), {"torch": torch})) is type(module)
    x = torch.linspace(-4, 4, 50)
    assert torch.equal(made(x), module.eval()(x))


@pytest.mark.parametrize("name", list(activations._KINDS))
def test_every_kind_is_described_by_itself(name: str) -> None:
    options = (0.5, 1.0) if name == "Threshold" else ()
    module = getattr(nn, name)(*options)
    text = activations.describe(module)
    assert text is not None
    assert text.startswith(f"{name}(")
    assert type(activations.make(text)) is type(module)


@pytest.mark.parametrize(
    "text",
    [
        *("", "nn.SiLU", "torch.nn.init", "nn.Conv2d(1, 1, 1)", "nn.Softmax(1)", "lambda: 1"),
        *("nn.SiLU()()", "nn.SiLU().forward(1)", "nn.SiLU(); 1", "nn.SiLU()\nimport os"),
        *("nn.SiLU(__import__('os'))", "nn.SiLU(*[1])", "nn.SiLU(**{})", "nn.LeakyReLU('a')"),
        *("nn.LeakyReLU(nan)", "nn.LeakyReLU(1e999)", "nn.LeakyReLU(True)", "nn.LeakyReLU(None)"),
        *("nn.LeakyReLU(slope=1)", "nn.ReLU6(1, 2, 3)", "nn.GELU('exact')", "nn.GELU(1)"),
        *("nn.PReLU(10**9)", "nn.PReLU(1000000000)", "nn.PReLU(0)", "nn.Threshold(1)"),
        *("eval('1')", "open('x', 'w')", "getattr(nn, 'SiLU')()", "(" * 199, "x" * 1000),
        *("torch.nn.torch.nn.SiLU.x()", "os.nn.SiLU()", "nn.SiLU[0]()", "f'{1}'", "nn.ELU(1j)"),
        *(None, 3, ["nn.SiLU()"], {"nn": 1}, b"nn.SiLU()"),
    ],
)
def test_texts_that_are_none(text: Any) -> None:
    with pytest.raises(UserError) as refused:
        activations.parse(text)
    assert "\n" not in str(refused.value)


def inert(name: str, **state: Any) -> Inert:
    made = Inert.named(name)()
    made.state.update(state)
    return made


def test_what_checkpoints_hold() -> None:
    place = "torch.nn.modules.activation"
    assert activations.describe(inert(f"{place}.LeakyReLU", negative_slope=0.3)) == (
        "LeakyReLU(negative_slope=0.3)"
    )
    # Not written down by older versions of PyTorch.
    assert activations.describe(inert(f"{place}.GELU")) == "GELU(approximate='none')"
    for own in ("utils.activations.Hardswish", "yolov5.utils.activations.Hardswish"):
        assert activations.describe(inert(own)) == "Hardswish()"
    for other in ("utils.activations.FReLU", f"{place}.MultiheadAttention", f"{place}.Softmax"):
        assert activations.describe(inert(other)) is None
        assert not activations.is_listed(inert(other))
    for slope in ("0.1", None, [0.1], float("nan"), True, 10**400):
        with pytest.raises(UserError, match=r"LeakyReLU has .* for its negative_slope"):
            activations.describe(inert(f"{place}.LeakyReLU", negative_slope=slope))

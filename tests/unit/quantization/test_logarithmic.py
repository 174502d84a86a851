"""Outputs of softmax as powers of two: the equation, what has them, and what refuses them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toys import SIDE, Toy
from torch import Tensor, nn

from dfq.api.export import export
from dfq.errors import UserError
from dfq.graph.fold_batchnorm import fold
from dfq.models.nn.matmul import Matmul
from dfq.ptq.activation_refinement import narrow_activations
from dfq.ptq.pipeline import calibrate_and_round
from dfq.qat.parameter_groups import require_gradients
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.layers import QuantMatmul
from dfq.quantization.logarithmic import LogarithmicQuantizer
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.settings import Quantization
from dfq.recipe import load_recipe
from dfq.runtime.progress import Silent


def by_hand(p: float, bits: int) -> float:
    """The level whose exponent is nearest, of those there are; zero is beyond them all."""
    exponents = range(2**bits)
    if p == 0:
        return 2.0 ** -exponents[-1]
    return 2.0 ** -min(exponents, key=lambda q: abs(q + math.log2(p)))


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_values_get_the_level_of_the_nearest_exponent(bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    scores = (
        torch.randn(6, 40, generator=draw) * torch.tensor([0.1, 1.0, 4.0, 9.0, 20.0, 90.0])[:, None]
    )
    values = torch.cat([scores.softmax(1).flatten(), torch.tensor([0.0, 1.0, 0.5, 0.75])])
    found = LogarithmicQuantizer(bits)(values)
    expected = [by_hand(float(p), bits) for p in values.double()]
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_gradients_go_straight_through_up_to_the_last_level() -> None:
    quantizer = LogarithmicQuantizer(2)
    # 2^-3 is the last one, and 2^-3.5 = 0.0884 where rounding would go beyond it.
    values = torch.tensor([0.0, 1e-6, 0.08, 0.1, 0.3, 1.0], requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (quantizer(values) * weight).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 0.0, 0.0, 4.0, 5.0, 6.0]
    assert quantizer(values.detach().bfloat16()).dtype == torch.float32


class Attending(nn.Module):
    """Attention, and a product whose left operand is a sigmoid, another of shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.gate, self.gated = nn.Linear(8, 8), Matmul()
        self.last = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Any:
        x = self.stem(images).flatten(2).mT
        x = x + self.attention(x, x, x)[0]
        return self.last(self.gated(self.gate(x).sigmoid(), x.mT @ x))


def made() -> Toy:
    torch.manual_seed(0)
    return fold(Toy(Attending(), last=("last",)))


PIXELS = (torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 255).byte()


def test_products_of_a_softmax_have_it_and_no_others() -> None:
    student = insert_quantizers(made().clone(), Policy(8, 6, softmax="log2"))
    found = {
        name: (type(layer.left_quantizer), type(layer.right_quantizer))
        for name, layer in student.module.named_modules()
        if isinstance(layer, QuantMatmul)
    }
    assert found == {
        "attention.scores": (Quantizer, Quantizer),
        "attention.mix": (LogarithmicQuantizer, Quantizer),
        "gated": (Quantizer, Quantizer),
    }
    assert student.module.get_submodule("attention.mix").left_quantizer.bits == 6


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_no_search_takes_it_for_a_grid(bits: int) -> None:
    section = Quantization(weight_bits=8, activation_bits=bits, softmax="log2", refine_images=0)
    teacher = made()
    student = insert_quantizers(teacher.clone(), section.policy())
    quantizer = student.module.get_submodule("attention.mix").left_quantizer
    assert quantizer not in [found for _, found in narrow_activations(student)]
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    calibrate_and_round(student, teacher, PIXELS, section, Silent())
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_reaches_what_is_before_it_and_not_its_state() -> None:
    student = insert_quantizers(made().clone(), Policy(8, 8, softmax="log2"))
    calibrate(student, [PIXELS.float() / 255])
    require_gradients(student.module, (), zero_points=True)
    student.raw(PIXELS.float() / 255).square().sum().backward()
    query = student.module.get_submodule("attention.query").weight
    assert query.grad is not None
    assert float(query.grad.abs().sum()) > 0
    quantizer = student.module.get_submodule("attention.mix").left_quantizer
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())


def test_a_network_without_any_says_so() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).softmax(1)

    with pytest.raises(UserError, match=r"quantization\.softmax: no softmax") as refused:
        insert_quantizers(Toy(Plain()), Policy(softmax="log2"))
    assert "\n" not in str(refused.value)


def test_no_placement_of_a_runtime_goes_with_it_and_policies_remember_it() -> None:
    with pytest.raises(UserError, match="softmax: log2 is in no file for a runtime") as refused:
        load_recipe(None, ["quantization.softmax=log2", "quantization.placement=qdq"])
    assert "\n" not in str(refused.value)
    policy = Quantization(softmax="log2").policy()
    assert Policy.from_dict(policy.to_dict()) == policy
    before = {key: v for key, v in policy.to_dict().items() if key != "softmax"}
    assert Policy.from_dict(before).softmax == "uniform"


def test_export_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(8, 8, softmax="log2")
    student = insert_quantizers(made().clone(), policy)
    monkeypatch.setattr("dfq.api.export.is_run", lambda _: True)
    monkeypatch.setattr("dfq.api.export.check_run", lambda _: {"policy": policy.to_dict()})
    monkeypatch.setattr("dfq.api.export.load_model", lambda *_, **__: student)
    monkeypatch.setattr("dfq.api.export.require_weights", lambda _: None)
    with pytest.raises(UserError, match="are powers of two in it") as refused:
        export(tmp_path / "run", tmp_path / "run.onnx")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run.onnx").exists()

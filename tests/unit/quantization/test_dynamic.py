"""Activations whose grid is that of the tensor at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_detector import blobs, tiny_detector
from torch import Tensor, nn

from dfq.api.evaluate import evaluate
from dfq.errors import UserError
from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Detector
from dfq.ptq.pipeline import calibrate_and_round
from dfq.quantization.calibration import calibrate
from dfq.quantization.dynamic import DynamicQuantizer, is_dynamic
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.settings import Quantization
from dfq.quantization.traversal import activation_quantizers
from dfq.recipe import load_recipe
from dfq.runtime.progress import Silent


def by_hand(x: Tensor, bits: int, kind: str) -> Tensor:
    """In double precision, on the grid between least and greatest value with zero on it."""
    x = x.double()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if kind == "asymmetric" or (kind == "unsigned" and low == 0):
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step)
        return ((x / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step
    most = 2 ** (bits - 1)
    step = max(high / (most - 1), -low / most)
    return (x / step).round().clamp(-most, most - 1) * step


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "unsigned"])
@pytest.mark.parametrize("bits", [2, 8])
def test_each_call_has_its_own_grid(kind: str, bits: int) -> None:
    quantizer = DynamicQuantizer(bits, asymmetric=kind == "asymmetric", unsigned=kind == "unsigned")
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    for size, shift in ((1.0, 0.3), (40.0, 0.0), (1e-3, -5e-4)):
        for values in (torch.randn(2, 3, 8, generator=draw) * size + shift,):
            for x in (values, values.abs()):
                torch.testing.assert_close(
                    quantizer(x).double(), by_hand(x, bits, kind), rtol=1e-5, atol=size * 1e-6
                )
    assert not quantizer(torch.zeros(4)).any()
    assert quantizer(torch.zeros(0, 4)).shape == (0, 4)
    assert quantizer(torch.randn(4).half()).dtype == torch.float32
    # What a call found is not kept.
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, state[name])


def test_no_image_is_looked_at_where_nothing_but_scales_needs_it() -> None:
    section = Quantization(
        weight_bits=4, activation_bits=6, activation_ranges="dynamic", reconstruction="none"
    )
    teacher = fold(tiny_detector().clone())
    student = insert_quantizers(teacher.clone(), section.policy())
    assert all(isinstance(q, DynamicQuantizer) for _, q in activation_quantizers(student.module))

    def refuse(*_: object) -> None:
        raise AssertionError("the network is run")

    handle = student.module.register_forward_pre_hook(refuse)
    calibrate_and_round(student, teacher, torch.zeros(0, 3, 64, 64).byte(), section, Silent())
    handle.remove()
    static = insert_quantizers(teacher.clone(), Policy(4, 6, 8))
    calibrate(static, [blobs(2)])
    pixels = blobs(2, seed=3)
    assert not torch.equal(student.raw(pixels)[0], static.raw(pixels)[0])
    # Grids move with what comes in; those that were found once do not.
    assert is_dynamic(student.module)
    assert not is_dynamic(static.module)


def test_a_policy_remembers_it() -> None:
    policy = Quantization(activation_ranges="dynamic").policy()
    assert Policy.from_dict(policy.to_dict()) == policy
    before = {key: v for key, v in policy.to_dict().items() if key != "activation_ranges"}
    assert Policy.from_dict(before).activation_ranges == "static"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "are not trained; set method: ptq"),
        (["method=ptq", "quantization.placement=qdq"], "are in no file for a runtime"),
        (["method=ptq", "quantization.ranges=pd"], "are not searched: ranges: pd"),
    ],
)
def test_what_does_not_go_with_it(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load_recipe(None, ["quantization.activation_ranges=dynamic", *overrides])
    assert "\n" not in str(refused.value)


def test_evaluation_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Quantization(activation_ranges="dynamic", reconstruction="none").policy()
    student = insert_quantizers(fold(tiny_detector().clone()), policy)
    calibrate(student, [])
    told: list[str] = []

    class Told(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    def stop(*_: object, **__: object) -> None:
        raise UserError("far enough")

    monkeypatch.setattr("dfq.api.evaluate.open_labelled", lambda *_: [])
    monkeypatch.setattr("dfq.api.evaluate.measured", stop)
    assert isinstance(student, Detector)
    with pytest.raises(UserError, match="far enough"):
        evaluate(student, "set", progress=Told())
    assert told == ["activations: dynamic ranges, each call's own least and greatest value"]


def test_gradients_go_straight_through() -> None:
    quantizer = DynamicQuantizer(4, asymmetric=True)
    x = torch.linspace(-1, 2, 9).requires_grad_()
    nn.functional.mse_loss(quantizer(x), torch.zeros(9)).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert quantizer.log_scale.grad is None

"""bfloat16 is used where a device has it, and refused in one line where it has not."""

from __future__ import annotations

import pytest
import torch
from support.tiers import published

from dfq.errors import UserError
from dfq.models import load_detector
from dfq.runtime.precision import computing_in, float32, resolve_precision

CPU = torch.device("cpu")


def test_bfloat16_without_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert resolve_precision("auto", CPU, "synthesis") == "float32"
    with pytest.raises(UserError, match=r"distillation\.precision: cpu has no instructions"):
        resolve_precision("bfloat16", CPU, "distillation")


def test_auto_takes_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert resolve_precision("auto", CPU, "synthesis") == "bfloat16"
    assert resolve_precision("float32", CPU, "synthesis") == "float32"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_convolutions_compute_in_it(precision: str) -> None:
    conv = torch.nn.Conv2d(3, 4, 1)
    with computing_in(precision, CPU):
        found = conv(torch.zeros(1, 3, 2, 2))
    assert found.dtype == getattr(torch, precision)


def test_whatever_holds_them_predictions_become_float32() -> None:
    half, whole = torch.ones(2, dtype=torch.bfloat16), torch.arange(3)
    (first, second) = float32([{"a": half}, whole])
    assert first["a"].dtype == torch.float32
    assert second is whole


@pytest.mark.parametrize("model", ["yolo11n.yaml", published("yolov10n.yaml")])
def test_ultralytics_predictions_become_float32_for_the_divergence(model: str) -> None:
    detector = load_detector(model)
    with torch.no_grad(), computing_in("bfloat16", CPU):
        raw = detector.raw(torch.rand(1, 3, 64, 64))
    pairs = detector.distillation_pairs(float32(raw), float32(raw))
    assert {tensor.dtype for pair in pairs for tensor in (pair.student, pair.teacher)} == {
        torch.float32
    }

"""mmcv's operations against torchvision's, through mmcv's own functions."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torchvision import ops

from dfq.errors import UserError
from dfq.models.mmdet.ops import EXTENSION, ensure_ops

ensure_ops()
# Imports the extension.
mmcv_ops = importlib.import_module("mmcv.ops")


def _boxes(count: int, side: float, generator: torch.Generator) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * side * 0.7
    extent = torch.rand(count, 2, generator=generator) * side * 0.3 + 1
    return torch.cat([corner, corner + extent], dim=1)


@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.7])
def test_nms(threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes, scores = _boxes(200, 60, generator), torch.rand(200, generator=generator)
    found, kept = mmcv_ops.nms(boxes, scores, threshold)
    expected = ops.nms(boxes, scores, threshold)
    assert torch.equal(kept, expected)
    assert 1 < len(kept) < 200
    assert torch.equal(found, torch.cat([boxes, scores[:, None]], 1)[expected])


def test_nms_in_whole_pixels() -> None:
    # Two boxes of 9 x 9, or 10 x 10 counting both ends, side by side but for two columns.
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [2.0, 0.0, 11.0, 9.0]])
    scores = torch.tensor([0.9, 0.8])
    # 7 / 11 = 0.636 as real numbers, 8 / 12 = 0.667 in whole pixels.
    assert len(mmcv_ops.nms(boxes, scores, 0.65, offset=0)[1]) == 2
    assert len(mmcv_ops.nms(boxes, scores, 0.65, offset=1)[1]) == 1


def test_batched_nms() -> None:
    generator = torch.Generator().manual_seed(1)
    boxes, scores = _boxes(100, 40, generator), torch.rand(100, generator=generator)
    labels = torch.randint(3, (100,), generator=generator)
    settings = {"type": "nms", "iou_threshold": 0.4}
    _, kept = mmcv_ops.batched_nms(boxes, scores, labels, settings)
    assert torch.equal(kept, ops.batched_nms(boxes, scores, labels, 0.4))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling", [0, 2])
def test_roi_align_values_and_gradients(aligned: bool, sampling: int) -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 3, 16, 16, generator=generator)
    owners = torch.randint(2, (7, 1), generator=generator).float()
    rois = torch.cat([owners, _boxes(7, 60, generator)], dim=1)
    upstream = torch.randn(7, 3, 5, 4, generator=generator)
    results = []
    for which in ("mmcv", "torchvision"):
        leaf = features.clone().requires_grad_()
        if which == "mmcv":
            pooled = mmcv_ops.roi_align(leaf, rois, (5, 4), 0.25, sampling, "avg", aligned)
        else:
            # Their "as dense as need be" is 0 and -1.
            pooled = ops.roi_align(leaf, rois, (5, 4), 0.25, sampling or -1, aligned)
        pooled.backward(upstream)
        results.append((pooled.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    assert float(results[0][1].abs().sum()) > 0


def test_nothing_else_pretends_to_exist() -> None:
    rois = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
    with pytest.raises(UserError, match="compiled mmcv") as error:
        mmcv_ops.roi_align(torch.zeros(1, 1, 4, 4), rois, (2, 2), 1.0, 0, "max", True)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="softnms"):
        mmcv_ops.soft_nms(torch.zeros(1, 4), torch.zeros(1))
    with pytest.raises(AttributeError):
        sys.modules[EXTENSION].__path__  # noqa: B018


def test_a_compiled_extension_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = ModuleType(EXTENSION)
    monkeypatch.setitem(sys.modules, EXTENSION, compiled)
    assert ensure_ops() is True
    assert sys.modules[EXTENSION] is compiled
    monkeypatch.undo()
    assert ensure_ops() is False

"""The two compiled operations of mmcv that box detectors need, where mmcv came without them.

mmcv's compiled extension exists for few versions of torch; `mmcv-lite` is mmcv without it. mmdet
cannot even be imported then, as its modules ask the extension for names. Where there is none, a
stand-in takes its place: `nms` and `roi_align` are torchvision's, and every other name raises a
`UserError` when it is called. A compiled extension is used where there is one.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

from ...errors import UserError

EXTENSION = "mmcv._ext"
_MAXIMUM = 0
"""mmcv's number for maximum pooling; 1 is the average."""


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices int64 `(k,)` of the boxes kept, best first.

    Args:
        boxes: `(n, 4)`, x1 y1 x2 y2.
        scores: `(n,)`.
        iou_threshold: in [0, 1].
        offset: 1 where sides are counted in whole pixels, otherwise 0.
    """
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torchvision_nms(boxes, scores.to(boxes.dtype), iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `output` `(k, c, aligned_height, aligned_width)` from `input` `(n, c, h, w)` at `rois`
    `(k, 5)`; `argmax_*` are for maximum pooling only.

    Raises:
        UserError: for maximum pooling, which torchvision does not have.
    """
    if pool_mode == _MAXIMUM:
        raise _missing("roi_align with pool_mode='max'")
    output.copy_(
        torch.ops.torchvision.roi_align(
            input,
            rois.to(input.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            sampling_ratio,
            aligned,
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `grad_input` `(n, c, h, w)` from the gradient of what `roi_align_forward` gave."""
    if pool_mode == _MAXIMUM:
        raise _missing("roi_align with pool_mode='max'")
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad_output,
            rois.to(grad_output.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


def _missing(name: str) -> UserError:
    return UserError(
        f"mmcv's compiled operation {name} is not installed, and dfq replaces nms and roi_align "
        "only: install a compiled mmcv 2.1.0 in place of mmcv-lite"
    )


class _Extension(ModuleType):
    """Stands in for `mmcv._ext`. mmcv asks at import whether all of its operations are there; what
    is not must be found then and fail when it is called."""

    nms = staticmethod(nms)
    roi_align_forward = staticmethod(roi_align_forward)
    roi_align_backward = staticmethod(roi_align_backward)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: Any, **__: Any) -> NoReturn:
            raise _missing(name)

        return absent


def ensure_ops() -> bool:
    """Put the stand-in in place of a missing extension; returns whether there is a compiled one.

    Raises:
        ImportError: mmcv is not installed at all.
    """
    if EXTENSION not in sys.modules and importlib.util.find_spec(EXTENSION) is None:
        module = _Extension(EXTENSION)
        # Without a loader, mmengine goes on taking mmcv for what it is: not the full one.
        module.__spec__ = ModuleSpec(EXTENSION, loader=None)
        sys.modules[EXTENSION] = module
    return not isinstance(sys.modules.get(EXTENSION), _Extension)

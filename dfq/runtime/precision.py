"""In what convolutions compute: float32, or bfloat16 where a device has it natively."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import UserError


def resolve_precision(wanted: str, device: torch.device, section: str) -> str:
    """ "float32" or "bfloat16", the latter for "auto" where the device computes in it natively.

    Args:
        wanted: "auto", "float32" or "bfloat16".
        device: that will compute.
        section: of the recipe, for the message.

    Raises:
        UserError: where bfloat16 is demanded of a device that is slower in it than in float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older torch does not tell.
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    if wanted == "auto":
        return "bfloat16" if native else "float32"
    if wanted == "bfloat16" and not native:
        raise UserError(
            f"{section}.precision: {device} has no instructions for bfloat16; use auto or float32"
        )
    return wanted


def computing_in(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within the context convolutions and products compute in `precision`, "float32" or
    "bfloat16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def float32(values: Any) -> Any:
    """Predictions of any nested structure with every floating tensor, of any shape, in float32."""
    return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, values)
